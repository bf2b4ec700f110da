"""What a job's flow run needs, before its job is started."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import flows.job
print(sorted({"mlflow", "pandas", "torch", "transformers"} & set(sys.modules)))
"""


def test_a_flow_run_of_a_job_imports_none_of_the_libraries_that_take_seconds():
    """A worker starts one for every job, and the job has a process of its own."""
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=here, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
