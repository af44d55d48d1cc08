// Synchrony
