import HostMemory

func release(_ page: consuming PageReference) {
    page.releaseUnused()
}
