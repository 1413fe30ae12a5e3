"""The captions in which a class is named: sets of templates, and names filled into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

TemplateSet = Literal["course", "article", "cifar18", "imagenet80"]
Spelling = Literal["spaces", "underscores"]


def template_sets() -> dict[str, tuple[str, ...]]:
    """All sets of templates by name.

    {} stands for the name of the class, {a} for the name with "a" or "an" before it.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # takes seconds to import

    return {
        "course": ("A photo of {}.",),
        "article": ("A photo of {a}.",),
        "cifar18": cifar_templates(),
        "imagenet80": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
    }


def cifar_templates() -> tuple[str, ...]:
    """The 18 templates of CLIP's authors for CIFAR."""
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    templates = []
    for kind in kinds:
        templates.append(f"a {kind}photo of a {{}}.")
        templates.append(f"a {kind}photo of the {{}}.")
    for size in ("small", "big"):
        templates.append(f"a photo of a {size} {{}}.")
        templates.append(f"a photo of the {size} {{}}.")
    return tuple(templates)


def prompts_of(name: str, templates: Sequence[str], spelling: Spelling) -> list[str]:
    """The prompts of one class: its name in every template.

    `spelling` says whether a name like traffic_light keeps its underscores or gets spaces.
    """
    if spelling == "spaces":
        name = name.replace("_", " ")
    article = "an" if name[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    with_article = f"{article} {name}"
    return [template.replace("{}", name).replace("{a}", with_article) for template in templates]
