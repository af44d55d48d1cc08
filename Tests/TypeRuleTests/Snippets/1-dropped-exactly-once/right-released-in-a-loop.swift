import HostMemory

func release(_ page: consuming PageReference) {
    for _ in 0..<4 { _ = page.frame }
    page.releaseUnused()
}
