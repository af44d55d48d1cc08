import HostMemory

func now(_ page: consuming PageReference) {
    let release = { (page: consuming PageReference) in page.releaseUnused() }
    release(page)
}
