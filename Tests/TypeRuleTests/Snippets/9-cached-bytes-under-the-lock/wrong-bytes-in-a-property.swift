// An object lives as long as it likes.

import GuestMemory

struct Clock {
    var page: CachedBytes  // error: has non-Escapable type 'CachedBytes'
}
