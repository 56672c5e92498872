"""The two experiments that every comparison needs: the same network, data, seed and recipe, without and with gates."""

from stochastic_depth_lab.experiments.config import Data, Depth, Experiment, Model, Published, Recipe

SOURCE = "Huang et al. 2016, table of results, as given by public summaries"
LATER_SOURCE = "Huang et al. 2016, as quoted by later papers"


def pair(
    name: str,
    title: str,
    data: Data,
    recipe: Recipe,
    *,
    model: Model,
    stochastic_recipe: Recipe | None = None,
    published: tuple[float, float] | None = None,
    published_h: tuple[float, float] | tuple[None, None] = (None, None),
    source: str = SOURCE,
) -> tuple[Experiment, Experiment]:
    """`name-constant` and `name-stochastic`, which has linear decay to 0.5 (Huang et al. 2016).

    Args:
        name: common part of their names.
        title: common part of their titles.
        data: the images.
        recipe: how both are trained.
        model: the network.
        stochastic_recipe: where stochastic depth is trained otherwise.
        published: test errors in percent, constant and stochastic.
        published_h: hours of training on one Titan X, constant and stochastic.
        source: where these stand.
    """
    constant, stochastic = (
        [Published(error, source, hours) for error, hours in zip(published, published_h, strict=True)]
        if published
        else (None, None)
    )
    return (
        Experiment(f"{name}-constant", f"{title}, constant depth", data, model, None, recipe, published=constant),
        Experiment(
            f"{name}-stochastic",
            f"{title}, stochastic depth",
            data,
            model,
            Depth(),
            stochastic_recipe or recipe,
            published=stochastic,
        ),
    )
