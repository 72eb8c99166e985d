"""What a command says that it will make beside what it was asked for."""

import pytest

from tiny import TINY

FEW = [*TINY, "rm.max_steps=1", "diffmodel.max_steps=1"]
SFT, ALIGN = "sft (toy) is made first: the base policy, from scratch", "align (dpo-none) is made first: the policy"
REWARD, DIFF = "rm (pointwise) is made first: for ", "diffmodel (paper) is made first: for "
CASES = {
    ("stage=align", "rc=diff", "rc.negative=abs"): [SFT, f"{DIFF}rc=diff: do without it there"],
    ("stage=eval", "eval.judges=[gold,reward]"): [SFT, ALIGN, f"{REWARD}eval.judges=[gold,reward]: do without"],
    ("stage=eval", "rc=reward", "eval.judges=[reward]"): [
        SFT,
        f"{REWARD}rc=reward and eval.judges=[reward]: do without it there, or give a finished one as rm.path",
        "align (dpo-reward-0.5) ",
    ],
    ("stage=eval", "eval.judges=[]", "eval.subject=base"): [SFT],
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_made_besides_is_said_before_anything_is_made_and_nothing_else_is(train_here, tmp_path, capsys, case):
    train_here(*FEW, *case, f"run_dir={tmp_path}")
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix("[plan] ") for line in lines if line.startswith("[plan] ")]
    assert len(said) == len(CASES[case])
    assert all(line.startswith(wanted) for line, wanted in zip(said, CASES[case], strict=True))
    assert f"[plan] {said[-1]}" in lines[: next(n for n, line in enumerate(lines) if line.startswith("[sft]"))]
    made = {folder.name for folder in tmp_path.iterdir()} - {"data", "hydra", "reference", "score", "generate"}
    assert made == {line.split()[0] for line in said} | {case[0].removeprefix("stage=")}
    train_here(*FEW, *case, f"run_dir={tmp_path}")
    assert "[plan]" not in capsys.readouterr().out
