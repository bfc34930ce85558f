"""Stage one: a teacher on labelled images."""

from depthany.tasks.base import DepthTask


class TeacherTask(DepthTask):
    """Learns from labels alone: the shared step without anything added (V1 and V2, stage one).

    Args:
        model: what is trained.
        loss: the weighted sum of named terms.
        plan: optimizer and schedule.
    """
