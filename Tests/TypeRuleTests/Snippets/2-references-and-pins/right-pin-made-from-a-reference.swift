import HostMemory

func convert(_ pin: consuming PagePin) -> PagePin {
    pin
}
