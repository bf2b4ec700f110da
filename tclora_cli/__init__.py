"""The command line ``tclora``, one small file per group of commands."""
