"""The autoscaling policy for Ray Serve: the number of images per replica decides."""

from typing import Any

from ray.serve.config import AutoscalingContext


class ImagesPerReplica:
    """Chooses the number of replicas so that each has `images` images that wait or run."""

    def __init__(self, images: float) -> None:
        self._images = images

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas, and no state.

        The number of images is a mean over `look_back_period_s`. Ray applies the bounds, the delays and the scaling
        factors of the configuration. As long as no replica has reported images, for example after a start of Ray's
        controller, the number of replicas stays.
        """
        of_replicas = (context.aggregated_metrics or {}).get("images", {})
        if not of_replicas:
            return context.target_num_replicas, {}
        return sum(of_replicas.values()) / self._images, {}
