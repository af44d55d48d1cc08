import HostMemory

func release(_ page: consuming PageReference, written: Bool) {
    if written { page.releaseDirty(stabilisedBy: .exclusiveOwner) } else { page.releaseUnused() }
}
