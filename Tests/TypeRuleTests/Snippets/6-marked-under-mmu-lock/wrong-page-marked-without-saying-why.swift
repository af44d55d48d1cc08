// A page handed out for itself may be marked, but its holder says what keeps it from being cleaned or freed.

import HostMemory

func end(_ page: consuming PageReference) {
    page.releaseDirty()  // error: missing argument for parameter 'stabilisedBy' in call
}
