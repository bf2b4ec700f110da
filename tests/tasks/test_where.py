from tasks.progress import JobProgress
from tasks.where import Where
from tclora.jobs.run import LocalExecutor
from tclora.library.layout import Layout


def test_stages_beside_each_other_share_the_cores_and_nothing_else(tmp_path):
    where = Where(Layout(tmp_path), None, LocalExecutor(slots=4), JobProgress(), 7)
    shared = where.shared_by(3)
    assert shared.executor.parallel == 3
    assert vars(shared) | {"executor": None} == vars(where) | {"executor": None}
    assert where.executor.parallel == 1
