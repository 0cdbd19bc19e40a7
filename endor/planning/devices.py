"""One plan for the ranges of a model on several devices."""

from collections.abc import Sequence

from endor.planning.cost import Prediction
from endor.planning.outcome import Plan


def combine(plans: Sequence[Plan]) -> Plan:
    """Return one plan for the ranges of a model on several devices.

    A step passes from device to device, so what they compute adds up; their links work at the
    same time, each ahead of its range; they share a disk.
    """
    if len(plans) == 1:
        return plans[0]

    def step(steps: Sequence[Prediction]) -> Prediction:
        resources = {
            name: (max if name == "link" else sum)(each.resources.get(name, 0.0) for each in steps)
            for name in dict.fromkeys(name for each in steps for name in each.resources)
        }
        names = dict.fromkeys(name for each in steps for name in each.parts)
        bound = max(resources, key=lambda name: resources[name])
        unhidden = sum(each.unhidden for each in steps)
        return Prediction(
            resources[bound] + unhidden,
            bound,
            resources,
            {name: sum(each.parts.get(name, 0.0) for each in steps) for name in names},
            unhidden,
            sum(each.disk_bytes for each in steps),
            sum(each.link_bytes for each in steps),
            sum(each.host_bytes for each in steps),
        )

    dense = [each.dense_decode for each in plans]
    return Plan(
        tiers={name: tier for each in plans for name, tier in each.tiers.items()},
        staging_bytes=sum(each.staging_bytes for each in plans),
        slots=sum(each.slots for each in plans),
        host_shares={name: share for each in plans for name, share in each.host_shares.items()},
        kept_bytes={name: nbytes for each in plans for name, nbytes in each.kept_bytes.items()},
        exchanges=next((each.exchanges for each in plans if each.exchanges), None),
        reservations=tuple(item for each in plans for item in each.reservations),
        ram_bytes=sum(each.ram_bytes for each in plans),
        vram_bytes=sum(each.vram_bytes for each in plans),
        decode=step([each.decode for each in plans]),
        prefill=step([each.prefill for each in plans]),
        load_s=sum(each.load_s for each in plans),
        dense_decode=None if None in dense else step([item for item in dense if item]),
        packed_bytes=sum(each.packed_bytes for each in plans),
        dense_bytes=sum(each.dense_bytes for each in plans),
        workload=plans[0].workload,
        way=next((each.way for each in plans if each.way != "stream"), "stream"),
    )
