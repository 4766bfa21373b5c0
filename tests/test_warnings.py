"""Warnings that users could do nothing about do not come."""

import warnings

from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


def test_putting_an_adapter_into_a_classifier_does_not_warn_and_changes_no_filter(classifier):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        get_peft_model(classifier, CLIPPromptTuningConfig())
        assert warnings.filters == filters
    assert [str(warning.message) for warning in caught] == []
