"""Logged metrics as TensorBoard event files."""


def write(run, folder):
    """Writes the metrics of a run of `load.load` into a folder, in place of an earlier call's; returns their number."""
    from tensorboardX import SummaryWriter  # which only this needs

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in run["metrics"]:
            for name, value in _scalars(record):
                writer.add_scalar(name, value, record["step"])
    return len(run["metrics"])


def _scalars(record, prefix=""):
    """Yields (name, value) of every number in a record; the names of nested ones are joined by slashes."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value
