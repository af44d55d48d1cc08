import HostMemory

func share(_ page: consuming PageReference) {
    let other = page
    other.releaseUnused()
}
