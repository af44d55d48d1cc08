import Frames

func number(of error: TranslationError) -> UInt64 {
    error.kernelEncoding
}
