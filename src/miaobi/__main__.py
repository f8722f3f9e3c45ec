"""`python -m miaobi`, the form torchrun needs."""

import atexit
import os
import sys

from miaobi.cli import main

code = 0
try:
    main()
except SystemExit as e:
    code = e.code or 0
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise
if "TORCHELASTIC_RUN_ID" in os.environ:
    # FSDP's caches hold groups of processes beyond destroy_process_group (torch 2.13), and gloo's threads may abort a
    # process whose interpreter is being taken down: torchrun would call a run failed that is done.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
