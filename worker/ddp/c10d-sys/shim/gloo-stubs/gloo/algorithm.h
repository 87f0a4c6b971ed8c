// Gloo's headers are not in the libtorch wheel. c10d's ProcessGroupGloo names gloo types only behind
// pointers, so these five stubs declare them and define nothing that has a layout of its own.
#pragma once
