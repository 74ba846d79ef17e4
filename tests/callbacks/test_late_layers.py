# SPDX-License-Identifier: Apache-2.0
"""Something can be called when a model has built its layers, and taken back again."""

from __future__ import annotations

import pytest
from specimens import Healthy

from lightning_bn.callbacks.late_layers import after_building


class Late(Healthy):
    """Builds its layers in ``configure_model``."""

    def configure_model(self):
        self.built = True


class Early(Healthy):
    """Has a ``setup`` of its own, and no ``configure_model``."""

    def setup(self, stage):
        self.built = True


HOOKS = pytest.mark.parametrize(("build", "hook"), [(Late, "configure_model"), (Early, "setup")])


def call(model, hook):
    """As Lightning does."""
    getattr(model, hook)(*(["fit"] if hook == "setup" else []))


def test_a_model_that_is_built_is_acted_on_at_once():
    """Without a hook of its own there is nothing to wait for."""
    seen, model = [], Healthy()
    after_building(model, lambda: seen.append(1))()
    assert seen == [1]
    assert "setup" not in vars(model)


@HOOKS
def test_acts_follow_the_hook_in_the_order_in_which_they_came(build, hook):
    """Each time that the hook is called the layers are there first."""
    model, seen = build(), []
    after_building(model, lambda: seen.append(("first", model.built)))
    after_building(model, lambda: seen.append(("second", model.built)))
    call(model, hook)
    call(model, hook)
    assert seen == [("first", True), ("second", True)] * 2


@HOOKS
def test_one_that_is_taken_back_leaves_the_other(build, hook):
    """A callback that failed does not take away what another one waits for."""
    model, seen = build(), []
    first = after_building(model, lambda: seen.append("first"))
    after_building(model, lambda: seen.append("second"))
    first()
    first()
    call(model, hook)
    assert seen == ["second"]


@HOOKS
def test_the_last_one_that_is_taken_back_leaves_the_hook_as_it_was(build, hook):
    """That of the class, or what the user had put on the instance."""
    model = build()
    for undo in [after_building(model, list), after_building(model, list)]:
        undo()
    assert hook not in vars(model)
    own = vars(model)[hook] = lambda *_: None
    after_building(model, list)()
    assert vars(model)[hook] is own


def test_what_the_user_has_put_in_the_place_meanwhile_stays():
    """A hook that is not ours any longer is left alone."""
    model = Late()
    undo = after_building(model, list)
    own = vars(model)["configure_model"] = lambda: None
    undo()
    assert vars(model)["configure_model"] is own
