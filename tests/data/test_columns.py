import warnings

import pytest
from conftest import TINY_CLIP
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.data import (
    cache_image_embeds,
    class_names_of,
    clean_class_name,
    content_hash,
    hold_out,
    sample_few_shot,
    split_base_new,
    with_pixel_values,
)
from clip_prompt_peft.data.columns import check_label_order, check_labels_are_numbers, find_label_column


def dataset(names):
    return Dataset.from_dict({"label": [0]}, features=Features({"label": ClassLabel(names=names)}))


@pytest.mark.parametrize(
    ("spelled", "clean"),
    [("golden_retriever", "golden retriever"), ("  the__cat ", "the cat"), ("BMW X5", "BMW X5")],
)
def test_underscores_become_spaces_and_case_is_kept(spelled, clean):
    assert clean_class_name(spelled) == clean


def test_class_names_are_in_the_order_of_the_labels():
    assert class_names_of(dataset(["zebra", "polar_bear"])) == ["zebra", "polar bear"]


def test_names_that_become_equal_are_an_error():
    with pytest.raises(ValueError, match="twice.*polar bear"):
        class_names_of(dataset(["polar_bear", "polar bear"]))


def test_a_column_without_names_is_an_error_that_lists_the_columns():
    numbers = Dataset.from_dict({"label": [0, 1], "file": ["a", "b"]})
    with pytest.raises(ValueError, match="'label' is a Value.*columns: label, file"):
        class_names_of(numbers)
    with pytest.raises(ValueError, match="'breed' is missing"):
        class_names_of(numbers, "breed")


@pytest.mark.parametrize(
    "function",
    [
        class_names_of,
        content_hash,
        split_base_new,
        lambda splits: hold_out(splits, 0.5),
        lambda splits: sample_few_shot(splits, num_shots=1),
        lambda splits: with_pixel_values(splits, None),
        lambda splits: cache_image_embeds(splits, CLIPForPromptClassification.from_pretrained(TINY_CLIP), None),
    ],
)
def test_all_splits_in_place_of_one_are_an_error_that_says_how_to_take_one(function):
    splits = DatasetDict(test=dataset(["cat", "dog"]), train=dataset(["cat", "dog"]))
    with pytest.raises(TypeError, match=r"one split, got a DatasetDict of 'test', 'train'; .* dataset\['test'\]"):
        function(splits)


def test_camel_case_is_split_on_request():
    assert clean_class_name("ApplyEyeMakeup", split_camel_case=True) == "Apply Eye Makeup"
    assert clean_class_name("TV_DVDs", split_camel_case=True) == "TV DVDs"
    assert clean_class_name("ApplyEyeMakeup") == "ApplyEyeMakeup"


class TestLabelOrder:
    @pytest.mark.parametrize("names", [["cat", "dog", "owl"], ["cat", "hound", "owl"], ["Cat", "DOG", "Owl"]])
    def test_classes_of_the_same_number_may_have_other_names(self, names):
        check_label_order(dataset(names), ["cat", "dog", "owl"])

    @pytest.mark.parametrize("names", [["polar bear", "cat", "owl"], ["polar_bear", "cat", "fox"]])
    def test_a_class_with_another_number_is_an_error(self, names):
        with pytest.raises(ValueError, match="another order: label 0 of the data set is 'polar.bear', and class"):
            check_label_order(dataset(names), ["cat", "polar bear", "owl"])

    def test_some_of_the_classes_are_a_warning(self):
        with pytest.warns(UserWarning, match="label 0 of the data set is 'dog', and class 1 of the model is 'dog'"):
            check_label_order(dataset(["dog", "owl"]), ["cat", "dog", "owl"])

    @pytest.mark.parametrize("names", [["Owl", "Cat", "Dog"], ["owl ", "_cat", "DOG"]])
    def test_names_that_are_spelled_otherwise_are_the_same_classes(self, names):
        with pytest.raises(ValueError, match="class 2 of the model is 'owl'.*align_labels_with_mapping"):
            check_label_order(dataset(names), ["cat", "dog", "owl"])
        check_label_order(dataset([names[1], names[2], names[0]]), ["cat", "dog", "owl"])

    def test_classes_of_one_side_may_differ_in_case_only(self):
        check_label_order(dataset(["Cat", "cat"]), ["Cat", "dog"])
        check_label_order(dataset(["CAT", "dog"]), ["Cat", "cat"])

    def test_without_names_nothing_is_known(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_label_order(dataset(["dog", "cat"]), None)
            check_label_order(Dataset.from_dict({"label": [0, 1]}), ["cat", "dog"])


class TestLabelsAreNumbers:
    @pytest.mark.parametrize("dtype", ["int8", "uint64", "bool", "float16", "float64"])
    def test_of_any_type(self, dtype):
        check_labels_are_numbers(Dataset.from_dict({"label": [0, 1]}).cast_column("label", Value(dtype)))

    @pytest.mark.parametrize("labels", [["cat", "dog"], [[0], [1]], [{"id": 0}, {"id": 1}]])
    def test_others_are_refused(self, labels):
        with pytest.raises(ValueError, match="'label' holds .*class_encode_column"):
            check_labels_are_numbers(Dataset.from_dict({"label": labels}))

    def test_missing_ones_are_counted(self):
        with pytest.raises(ValueError, match="1 of 3 rows have no value in the column 'label', such as row 1"):
            check_labels_are_numbers(Dataset.from_dict({"label": [0, None, 1]}))


class TestTwoColumnsOfLabels:
    @pytest.mark.parametrize("feature", [Value("string"), ClassLabel(names=["cat", "dog"])])
    @pytest.mark.parametrize("names", [("target", "labels"), ("class", "target"), ("labels", "class")])
    def test_are_an_error_that_names_both(self, names, feature):
        features = Features({"image": Image(), **dict.fromkeys(names, feature)})
        with pytest.raises(ValueError, match=rf"More than one .*{', '.join(names)}.*label_column"):
            find_label_column(features)
        assert find_label_column(features, names[1]) == names[1]

    @pytest.mark.parametrize("names", [("class", "label"), ("label", "target")])
    def test_label_is_taken_and_the_other_is_told(self, names, caplog):
        assert find_label_column(Features(dict.fromkeys(names, Value("string")))) == "label"
        other = next(name for name in names if name != "label")
        assert f"'label', and not from ['{other}']" in caplog.text

    @pytest.mark.parametrize("kind", ["string", "large_string", "int64"])
    @pytest.mark.parametrize("usual", ["label", "class"])
    def test_a_class_label_of_another_name_is_taken_and_the_usual_one_is_told(self, usual, kind, caplog):
        features = Features({usual: Value(kind), "image": Image(), "breed": ClassLabel(names=["cat", "dog"])})
        assert find_label_column(features) == "breed"
        assert f"column 'breed' (ClassLabel of 2), and not from '{usual}' ({kind}); name another" in caplog.text
        caplog.clear()
        assert find_label_column(features, "breed") == "breed" and not caplog.text

    def test_a_class_label_of_a_usual_name_is_taken_and_the_text_is_told(self, caplog):
        features = Features({"label": Value("string"), "class": ClassLabel(names=["cat", "dog"])})
        assert find_label_column(features) == "class"
        assert "column 'class' (ClassLabel of 2), and not from 'label' (string)" in caplog.text

    def test_a_column_beside_it_of_another_name_or_type_is_no_label(self, caplog):
        assert find_label_column(Features({"label": Value("string"), "label_name": Value("string")})) == "label"
        assert find_label_column(Features({"label": Value("int64"), "class": Value("string")})) == "class"
        assert not caplog.text
