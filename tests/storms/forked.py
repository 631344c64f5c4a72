"""Processes forked from one that has done all the imports, so that storms can start and kill them by the dozen."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# pytest is what these processes take for their main module.
PROCESSES.set_forkserver_preload(["services.api.main", "services.worker.main", "pytest"])
