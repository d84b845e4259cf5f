"""Keys by their values: names without wrappers, weights under an architecture's names, equal encoders, branches."""

import pytest
import torch

from collapse import InputError
from collapse.checkpoints.keys import (
    Weights,
    beside,
    branch_named,
    choose_branch,
    clean,
    flatten,
    merge_roots,
    parent,
    plain,
    same,
)
from collapse.files import limits

ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


def weights(**tensors):
    return Weights(tensors, {name: (f"file.{name}",) for name in tensors})


def test_weights_are_renamed_rule_after_rule_and_joined_in_the_order_of_their_suffixes():
    given = Weights({"v": 3 * ONE, "q": ONE, "k": TWO, "x": ONE}, {name: (f"file.{name}",) for name in "vqkx"})
    found = given.renamed([("^v$", "qkv#2"), ("^q$", "qkv#0"), ("^k$", "y"), ("^y$", "qkv#1")])
    assert found.tensors["qkv"].tolist() == [1, 1, 2, 2, 3, 3]
    assert found.keys == {"qkv": ("file.q", "file.k", "file.v"), "x": ("file.x",)}
    assert found.tensors["x"] is given.tensors["x"]


def test_two_tensors_of_one_name_or_of_other_shapes_are_refused():
    with pytest.raises(InputError, match="tensors 'a' and 'b' both stand for 'c'"):
        weights(a=ONE, b=TWO).renamed([("[ab]", "c")])
    with pytest.raises(InputError, match="the 2 parts of 'c' do not fit together"):
        weights(a=torch.ones(2, 3), b=torch.ones(2, 2)).renamed([("a", "c#0"), ("b", "c#1")])


def test_a_shape_is_asked_for_with_its_axes():
    found = weights(a=torch.ones(2, 3), none=torch.ones(0, 3))
    assert found.shape("a") == found.shape("a", 2) == found.shape("a", 1, 2) == (2, 3)
    assert found.shape("none") == (0, 3)
    for name, message in (("b", "no 'b'; is the file whole"), ("none", r"'none' is \(0, 3\), expected 2 axes"),
                          ("a", r"'a' is \(2, 3\), expected 1 or 4 axes")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            found.shape(name, *((1, 4) if name == "a" else (2,)))


def test_tensors_have_dotted_keys_in_their_order_without_the_state_of_training():
    tree = {
        "model": {"b": ONE, "a": [{"w": TWO}, 3, {1: ONE}]},
        "optimizer": {"state": {"x": ONE}},
        "queue": ONE,  # a tensor of that name stays
        "queue2": [{"w": ONE}],
        ("odd",): ONE,
        "text": "no tensor",
    }
    assert [key for key, _ in flatten(tree)] == ["model.b", "model.a.0.w", "model.a.2.1", "queue", "<tuple>"]
    assert [key for key, _ in flatten({10**18: ONE, 10**18 - 1: ONE})] == ["<int>", "999999999999999999"]


def test_a_tree_has_as_many_parts_and_letters_as_the_limits_say(monkeypatch):
    monkeypatch.setattr(limits, "PARTS", 4)
    monkeypatch.setattr(limits, "KEY", 6)
    assert len(list(flatten({"a": ONE, "b": ONE, "c": ONE}))) == 3
    assert [key for key, _ in flatten({"abcde": ONE})] == ["abcde"]
    for tree in ({"a": ONE, "b": ONE, "c": ONE, "d": ONE}, {"abcdef": ONE}):
        with pytest.raises(InputError, match="without end"):
            list(flatten(tree))


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("module._orig_mod.a.module.weight", "a.weight"),
        ("modules.weight", "modules.weight"),
        ("a.parametrizations.weight.original0", "a.weight_g"),
        ("a.parametrizations.weight.original1", "a.weight_v"),
        ("a.parametrizations.weight.original2", "a.parametrizations.weight.original2"),
    ],
)
def test_a_plain_key_has_no_wrappers(key, short):
    assert plain(key) == short


def test_chunks_of_blocks_are_one_list_unless_two_would_be_one():
    tensors = clean({"blocks.0.0.norm1.w": ONE, "a.blocks.1.7.mlp.w": TWO, "blocks.0.0.other.w": ONE}, "x")
    assert list(tensors) == ["blocks.0.norm1.w", "a.blocks.7.mlp.w", "blocks.0.0.other.w"]
    stages = {"blocks.0.0.norm1.w": ONE, "blocks.1.0.norm1.w": TWO}
    assert list(clean(stages, "x")) == list(stages)


def test_clean_takes_equal_tensors_once_and_refuses_what_it_cannot_hold(monkeypatch):
    assert list(clean({"module.a": ONE, "a": ONE.clone()}, "x")) == ["a"]
    cut = torch.ones(4).as_strided((2,), (1,))
    cut.untyped_storage().resize_(4)
    for tree, message in (
        ({"module.a": ONE, "a": TWO}, "x: two different tensors are called 'a'"),
        ({"a": ONE.to_sparse()}, "x: tensor 'a' is sparse"),
        ({"a": cut}, r"x: tensor 'a' \(2,\) is larger than what the file stores"),
    ):
        with pytest.raises(InputError, match=message):
            clean(tree, "x")
    monkeypatch.setattr(limits, "TENSORS", 2)
    assert len(clean({"a": ONE, "b": ONE}, "x")) == 2
    with pytest.raises(InputError, match="more than 2 tensors"):
        clean({"a": ONE, "b": ONE, "c": ONE}, "x")


def test_tensors_are_the_same_by_shape_type_and_value():
    eight = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert same(ONE, ONE)
    assert same(ONE, ONE.clone())
    assert same(eight, eight.clone())
    assert same(torch.tensor(torch.nan), torch.tensor(torch.nan)) is False
    shared = torch.tensor([torch.nan, 1.0, 2.0, 3.0])
    assert same(shared, shared.view(4))  # one storage: nothing is compared
    assert not same(shared[1:3], shared[::2][:2])
    for other in (TWO, ONE[:1], ONE.double(), torch.ones(1, 2)):
        assert not same(ONE, other)
    assert not same(eight, torch.tensor([2.0, 1.0]).to(torch.float8_e4m3fn))


def encoder(root, value=1.0, count=20):
    return {f"{root}layer{k}": torch.full((2,), value + k) for k in range(count)}


def test_encoders_of_the_same_tensors_are_one_and_the_one_beside_a_projector_is_kept():
    assert merge_roots(["a.", "b."], encoder("a.") | encoder("b.")) == ["a."]
    assert merge_roots(["a.", "m.b."], encoder("a.") | encoder("m.b.") | {"m.projector.0": ONE}) == ["m.b."]
    assert merge_roots(["b.", "a."], encoder("a.") | encoder("b.", 2.0)) == ["b.", "a."]
    ninety = encoder("a.") | encoder("b.", count=18)  # 9 tenths of a's: not more
    assert merge_roots(["b.", "a."], ninety) == ["b.", "a."]
    assert merge_roots(["b.", "a."], encoder("a.") | encoder("b.", count=19)) == ["b."]


def test_a_projector_beside_a_root_has_its_parent_and_a_name_that_ends():
    assert (parent("a.b."), parent("a."), parent("")) == ("a.", "", "")
    assert beside("a.b.", {"a.projector.0.weight": ONE})
    assert beside("b.", {"proj_head.weight": ONE})
    for key in ("projector.weight", "a.b.projector.weight", "a.proj", "a.proj-x.weight"):
        assert not beside("a.b.", {key: ONE}), key


@pytest.mark.parametrize(
    ("roots", "chosen"),
    [
        (["any."], "any."),
        (["student.", "teacher."], "teacher."),
        (["m.encoder_k.", "m.encoder_q."], "m.encoder_q."),
        (["online.net.", "target.net."], "online.net."),
        (["key_net.", "query_net."], "query_net."),
        (["encoder.", "target_encoder."], "target_encoder."),
        (["backbone.", "momentum_backbone."], "backbone."),
        (["ema_state_dict.net.", "state_dict.net."], "state_dict.net."),
        (["backbone.", "teacher_backbone."], "backbone."),
    ],
)
def test_the_branch_that_authors_evaluate_is_chosen_by_the_names_of_all(roots, chosen):
    assert choose_branch(roots) == choose_branch(roots[::-1]) == chosen


def test_a_distilled_network_is_told_by_its_teachers_queue():
    roots = ["student_embedding_model.net.", "teacher_embedding_model.net."]
    assert choose_branch(roots, ["teacher_queue"]) == roots[0]
    assert choose_branch(roots, ["queue"]) == roots[1]


def test_unclear_branches_are_listed():
    for roots in (["a.", "b."], ["teacher.a.", "teacher.b.", "student."], ["encoder_q.", "other."]):
        with pytest.raises(InputError, match=f"holds {len(roots)} encoders, .*; choose one with branch="):
            choose_branch(roots)
    with pytest.raises(InputError, match=r"2 encoders, \(top\), b; choose"):
        choose_branch(["", "b."])


def test_a_branch_is_named_whole_before_in_part_and_by_its_alias():
    roots, aliases = ["net.", "net.inner.", "other."], ["copy.of.net."]
    assert branch_named("net", roots, aliases) == "net."
    assert branch_named("inner", roots, aliases) == "net.inner."
    assert branch_named("other.", roots) == "other."
    assert branch_named("copy", roots, aliases) == "copy.of.net."
    assert branch_named("(top)", ["", "b."]) == ""
    with pytest.raises(InputError, match=r"branch='e' is in the names of 3 encoders, net, net.inner, other"):
        branch_named("e", roots)
    with pytest.raises(InputError, match=r"no encoder at 'x'; there are net, net.inner, other"):
        branch_named("x", roots, aliases)
