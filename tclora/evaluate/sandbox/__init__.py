"""Programs judged by unit tests, in sandboxes: no network, no files, no time without limits.

The program and its tests run in two sandboxes, each a process tree of its own. The tests reach the
program's functions through a socket that carries data alone: a program never sees what is expected
of it, so that it passes by returning the right values or not at all. What it prints, how it exits
and what it changes in its own interpreter count for nothing.

======================  ==========================================================================
module                  what it holds
======================  ==========================================================================
``judge``               `run_tests`: starts both sandboxes, returns a `Verdict`
``limits``              `Limits`, and what each isolation keeps a program from
``supervisor``          the process above a sandbox: starts it, ends it, keeps the output short
``confine``             namespaces, mounts, users, limits: from here nothing leads back
``syscalls``            the seccomp filter
``kernel``              calls of the C library that Python has no function for
``program``, ``tests``  what runs in the two sandboxes
``peer``, ``values``    calls between them, and their arguments and results as JSON
======================  ==========================================================================

All but ``judge`` need the standard library alone, and little of it: they run in a bare interpreter,
twice for each program.
"""
