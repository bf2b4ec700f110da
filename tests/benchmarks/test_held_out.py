from benchmarks.held_out import cluster_adapters


def test_adapters_come_in_the_order_of_their_clusters_numbers():
    names = [f"cluster-{k}" for k in range(12)]
    assert cluster_adapters([*reversed(names), "joint"]) == names
