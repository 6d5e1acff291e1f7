"""What the demonstration's models are worth is what the mesh file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.local.commands import DEMONSTRATION
from services.mesh import meshfile

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.mesh

FLOORS = {"linear": 0.712, "small": 0.713, "full": 0.761}
LEAKY_AUC = 0.788
"""What a join by scheduled rather than known time reaches: an AUC near it would mean that features leak."""


def test_each_tier_is_as_good_as_its_mesh_file_declares_and_no_better_than_honest(stack: Stack) -> None:
    judged = json.loads((Path(stack.environ["TENFOLD_HOME"]) / "flights" / "evaluation.json").read_text())
    tiers = {tier.name: tier for tier in meshfile.load(DEMONSTRATION).models[0].tiers}
    assert tiers.keys() == judged["tiers"].keys() == FLOORS.keys()
    for name, floor in FLOORS.items():
        auc = judged["tiers"][name]["auc"]
        assert floor <= auc < LEAKY_AUC - 0.01
        assert tiers[name].quality == pytest.approx(auc, abs=0.005)
    assert judged["test_flights"] > 50_000
    assert judged["stored_features"] >= 50
