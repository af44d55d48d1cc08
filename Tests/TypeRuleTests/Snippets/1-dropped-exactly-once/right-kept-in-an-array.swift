import HostMemory

func keep(_ page: consuming PageReference) {
    let kept: PageReference? = page
    kept?.releaseUnused()
}
