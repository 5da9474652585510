"""What runs on a Ray cluster, and the only library code that imports ray.

The kernel, used by every kind of run:

    run         the life of a run: folder, one driver, attempts, signals, exit status, page, submission id
    cluster     the connection to Ray, and what its nodes have free
    placement   how many workers or replicas fit, and what each of them gets
    models      models on workers: pinned, shipped and loaded in one way
    shipping    a folder of the driver's node on nodes that do not have it
    samples     calibration and training samples from Parquet files and lmms-eval tasks
    progress    the progress bar

Built on it: sweep/, campaign/, training/ and serving/.
"""
