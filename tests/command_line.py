"""Runs the command line in the process of the tests."""

import json

from typer.testing import CliRunner

from headstart.cli import app


def run(*arguments):
    """The result of `headstart` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments):
    """What a command prints with --json, which must succeed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
