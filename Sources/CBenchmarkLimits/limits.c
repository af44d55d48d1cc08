#include "CBenchmarkLimits.h"
