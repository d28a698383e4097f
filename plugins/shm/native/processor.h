/* Which instructions this processor has. */
#ifndef DATADIST_PROCESSOR_H
#define DATADIST_PROCESSOR_H

enum { HAS_ERMS = 1, HAS_AVX2 = 2, HAS_AVX512F = 4 };

/* Those of HAS_... that it has and that the kernel saves the registers of; asked once. */
int processor_features(void);

#endif
