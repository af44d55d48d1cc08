#include "CSchedule.h"
