"""Tests that change the process they run in: all of a file share one other process, forked from one with the libraries."""

import functools
import importlib
import os
import traceback
from multiprocessing.connection import Connection

import pytest
from helpers import process_context


def _serve(connection: Connection, environment: dict) -> None:
    os.environ.update(environment)
    while True:
        module, name, kwargs = connection.recv()
        try:
            getattr(importlib.import_module(module), name).__wrapped__(**kwargs)
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(None)


@functools.cache
def _process(environment: tuple) -> Connection:
    context = process_context()
    here, there = context.Pipe()
    # It ends with the process of the tests.
    context.Process(target=_serve, args=(there, dict(environment)), daemon=True).start()
    there.close()
    return here


def in_own_process(**environment: str):
    """Runs a test in the process that has these variables; its arguments must be picklable."""

    def decorate(test):
        @functools.wraps(test)
        def run(**kwargs):
            connection = _process(tuple(environment.items()))
            connection.send((test.__module__, test.__name__, kwargs))
            failure = connection.recv()
            if failure is not None:
                pytest.fail(failure, pytrace=False)

        return run

    return decorate
