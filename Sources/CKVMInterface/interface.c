// Everything is in the headers; a target needs a source file.
#include "CKVMInterface.h"
