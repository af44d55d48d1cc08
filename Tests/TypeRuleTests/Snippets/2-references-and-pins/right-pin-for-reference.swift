import HostMemory

func put(_ page: consuming PageReference) { page.releaseUnused() }

func end(_ page: consuming PageReference) {
    put(page)
}
