import HostMemory

func end(_ page: consuming PageReference) {
    page.releaseDirty(stabilisedBy: .exclusiveOwner)
}
