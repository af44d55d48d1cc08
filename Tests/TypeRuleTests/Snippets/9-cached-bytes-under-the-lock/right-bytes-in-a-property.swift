import GuestMemory

struct Clock {
    var page: FrameCache
}
