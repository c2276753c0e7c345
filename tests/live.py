"""A profile's stages in this process: seconds instead of a kernel for each."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from llmeco_nb.core import read_json
from llmeco_nb.runner.stages import StageRegistry, read_profile


def live(
    profile: str,  # Name of a profile
    store: Path,  # Where the records go
    given: dict[str, dict],  # Parameters by stage or instance; the instance's count
    only: set[str] | None = None,  # Names of the instances to run; None for all
) -> dict[str, Path]:
    """Every stage of a profile, wired as the pipeline does it: {instance: its record's folder}.

    Of each notebook the parameters, imports, `run` and `show` cells are executed, as papermill
    would, but in this process."""
    instances, _ = read_profile(StageRegistry.find(), profile)
    notebooks = {one.name: one.notebook for one in instances}
    made: dict[str, Path] = {}

    def artifact(ref: str, name: str) -> list[str]:
        giver, _, asked = ref.partition(":")
        if giver not in made:
            return []  # of the round before, or feedback: there is none
        outputs = notebooks[giver].contract["outputs"]
        single = outputs[0] if len(outputs) == 1 else name
        return [str(made[giver] / (asked or (name if name in outputs else single)))]

    for one in instances:
        if only is not None and one.name not in only:
            continue
        one.set({**given.get(one.stage, {}), **given.get(one.name, {})}, "the test")
        names: dict = {}
        for name, refs in one.wires.items():
            paths = [p for ref in refs for p in artifact(ref, name)]
            names[name] = paths if one.inputs[name] == "[]" else "".join(paths)
        out = store / one.name
        scope: dict = {}
        for c in one.notebook.role("imports", "parameters"):
            exec(c.source, scope)
        scope |= {**one.values, **names, "out": str(out)}
        for c in one.notebook.role("run", "show"):
            exec(compile(c.source, f"{one.name}, cell {c.id}", "exec"), scope)
        plt.close("all")
        absent = [o for o in one.notebook.contract["outputs"] if not (out / o).exists()]
        assert not absent, f"{one.name} did not write {absent}"
        made[one.name] = out
    return made


def reads_back_the_same(record: Path) -> bool:
    """Whether a saved classifier, read back in float32, answers as it did in training: no score
    differs by 0.05, and no class but between two that were as near as twice that difference.

    A training in bfloat16 may order two nearly equal scores otherwise than float32 does."""
    from llmeco_nb.tasks.predictions import read_predictions_file, scores_of

    m = read_json(record / "metrics.json")
    found = read_predictions_file(record / "predictions", split="validation").head(32)
    scores = np.sort(scores_of(found), axis=1)
    # float32 rounds both scores once more
    tied = scores[:, -1] - scores[:, -2] <= 2 * m["reopened_difference"] + 1e-6
    return m["reopened_difference"] < 0.05 and m["reopened_agrees"] >= 1 - tied.mean()
