"""``gmprobe completion``: what a shell needs to complete commands, options and choices."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from gm_probe.cli.kinds import Choice

VARIABLE = "_GMPROBE_COMPLETE"
"""What click reads when a shell asks for completions."""


@click.command(epilog='Example:  eval "$(gmprobe completion bash)"')
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL.

    \b
    bash   eval "$(gmprobe completion bash)"        in ~/.bashrc
    zsh    eval "$(gmprobe completion zsh)"         in ~/.zshrc
    fish   gmprobe completion fish | source         in ~/.config/fish/config.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(ctx.find_root().command, {}, "gmprobe", VARIABLE).source())
