import HostMemory

func look(at page: borrowing PageReference) {
    _ = page.frame
}
