import HostMemory

func look(_ page: borrowing PageReference) {}
