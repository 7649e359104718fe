"""How `condzoo` ends: the exit codes that scripts and launchers rely on (0 is done)."""

CHECK_FAILED = 1  # a check did not hold, or a run of several failed
BAD_INPUT = 2  # one clear line says what came, what is allowed and what to do
DIVERGED = 3
STOPPED = 75  # on a signal, everything saved; sysexits.h EX_TEMPFAIL: run the same command again
