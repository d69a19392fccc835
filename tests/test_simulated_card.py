"""Every CUDA path, on a card that is simulated: the allocator, checks and streams are PyTorch's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from localgrad.memory.cards import card_named

if TYPE_CHECKING:
    from simulated import SimulatedCard

MIB = 1 << 20

FACTS = """
import json, torch
from research.simulated_card import inside

facts = {"available": torch.cuda.is_available(), "devices": torch.cuda.device_count()}
properties = torch.cuda.get_device_properties(0)
facts |= {"name": properties.name, "total": properties.total_memory}
facts |= {"multiprocessors": properties.multi_processor_count, "capability": torch.cuda.get_device_capability()}
facts["free"] = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
held = torch.ones(1 << 20, device="cuda:1")
facts["taken"] = [before - torch.cuda.mem_get_info(index)[0] for index, before in enumerate(facts["free"])]
facts["reserved"] = [torch.cuda.memory_reserved(index) for index in range(2)]
facts["sum"] = (held @ held).item(), held.device.index
try:
    held + torch.ones(1 << 20, device="cuda:0")
except RuntimeError as error:
    facts["refused"] = str(error)
try:
    torch.empty(1 << 30, device="cuda:0")
except torch.OutOfMemoryError as error:
    facts["full"] = type(error).__name__
torch.manual_seed(0)
facts["drawn"] = [torch.randn(3, device=f"cuda:{index}").tolist() for index in range(2)]
inside.reset()
held.mul_(2)
facts["counts"] = inside.counts()
print(json.dumps(facts))
"""


def facts_of(text: str) -> Any:
    """The last line that a script printed."""
    return json.loads(text.splitlines()[-1])


def test_the_simulated_card_is_what_it_says(simulated: SimulatedCard) -> None:
    card = card_named("T4")
    facts = facts_of(
        simulated.run(FACTS, card=card, total_bytes=600 * MIB, taken_bytes=88 * MIB, devices=2, values=True)
    )
    assert facts["available"]
    assert facts["devices"] == 2
    assert (facts["name"], facts["total"]) == ("T4", 600 * MIB)
    assert facts["multiprocessors"] == card.multiprocessors
    assert facts["capability"] == list(card.capability)
    assert facts["free"] == [512 * MIB, 512 * MIB]
    assert facts["taken"] == [0, 20 * MIB]  # each device has memory of its own; 20 MiB is what the allocator asks for
    assert facts["reserved"] == [0, 20 * MIB]
    assert facts["sum"] == [float(1 << 20), 1]
    assert "two devices" in facts["refused"] or "same device" in facts["refused"]
    assert facts["full"] == "OutOfMemoryError"
    assert facts["drawn"][0] == facts["drawn"][1]  # one seed for all devices, as CUDA has it
    assert facts["counts"]["launches"] == 1
