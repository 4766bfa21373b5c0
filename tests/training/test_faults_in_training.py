"""What goes wrong in the middle of a training: nothing is lost, and the message says what to do."""

import contextlib
import json
import resource
import subprocess
import sys

import kill_and_resume
import pytest
import torch
from adapters import randomize, tuned, vectors_in, vectors_of
from conftest import CLASS_NAMES, EMOJI, TINY_CLIP
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.data import UnreadableImageError, cache_image_embeds, load_image_dataset, with_pixel_values
from clip_prompt_peft.training.callbacks import StopAtNonFinite
from clip_prompt_peft.training.checkpoints import checkpoints_in, last_whole_checkpoint


COMMAND, PROGRAM = "train", "clip-prompt train"
SMALL = ["--num_seeds", "1", "--shots", "2", "--num_train_epochs", "3", "--disable_tqdm", "true"]
CHECKPOINTS = [*SMALL, "--save_strategy", "epoch", "--save_total_limit", "3"]
RESUME = ["--resume_from_checkpoint", "true"]


@contextlib.contextmanager
def disk_full_at(num_bytes):
    """Within it no file can become longer than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_training_that_is_killed_ends_with_the_same_vectors_once_it_is_continued():
    command = [sys.executable, kill_and_resume.__file__, "--kills", "1", "--trainings", "short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 1 and counts["finished"] >= 1 and counts["lost"] == 0


class TestBrokenOffWhileSaving:
    @pytest.mark.slow
    def test_the_half_checkpoint_is_passed_over_and_the_run_ends_as_if_nothing_had_been(
        self, run_here, tmp_path, monkeypatch, caplog
    ):
        run_here(COMMAND, *CHECKPOINTS, "--output_dir", "whole")
        with monkeypatch.context() as patch:
            save, calls = Trainer._save_rng_state, []

            def fail_the_second_time(trainer, output_dir):
                calls.append(output_dir)
                if len(calls) == 2:
                    raise OSError(28, "No space left on device")
                save(trainer, output_dir)

            patch.setattr(Trainer, "_save_rng_state", fail_the_second_time)
            with pytest.raises(OSError, match="No space left"):
                run_here(COMMAND, *CHECKPOINTS, "--output_dir", "broken")
        assert (
            "continue 'broken/seed1/checkpoint-1': the same command with --resume_from_checkpoint true" in caplog.text
        )
        caplog.clear()
        run_here(COMMAND, *CHECKPOINTS, *RESUME, "--output_dir", "broken")
        assert (
            "broken/seed1/checkpoint-2 is passed over, since it is not whole: trainer_state.json is missing"
            in caplog.text
        )
        assert torch.equal(vectors_in(tmp_path / "broken/seed1"), vectors_in(tmp_path / "whole/seed1"))

    def test_a_half_checkpoint_that_is_named_is_refused(self, run_here, tmp_path):
        (tmp_path / "out/seed1/checkpoint-3").mkdir(parents=True)
        with pytest.raises(SystemExit, match="checkpoint-3' is not whole: trainer_state.json is missing. .* true"):
            run_here(COMMAND, *SMALL, "--output_dir", "out", "--resume_from_checkpoint", "out/seed1/checkpoint-3")

    @pytest.mark.slow
    def test_on_a_full_disk_it_is_told_what_there_is_to_continue(self, run_here, tmp_path, caplog):
        run_here(
            COMMAND, *CHECKPOINTS, "--output_dir", "before"
        )  # from here on data and embeddings are in their caches
        with disk_full_at(5000), pytest.raises(RuntimeError):  # the adapter has room, the optimizer has not
            run_here(COMMAND, *CHECKPOINTS, "--output_dir", "out")
        assert "There is no checkpoint to continue from" in caplog.text
        assert checkpoints_in(tmp_path / "out/seed1") and last_whole_checkpoint(tmp_path / "out/seed1") is None


class TestSaving:
    @pytest.fixture
    def saved(self, classifier, tmp_path):
        """A model whose vectors have changed since it was saved, and the files that it was saved to."""
        model = tuned(classifier)
        model.save_pretrained(tmp_path / "adapter")
        before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
        randomize(model, seed=1)
        return model, tmp_path / "adapter", before

    def files(self, folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    @pytest.mark.parametrize("num_bytes", [0, 500, 1000, 1500])
    def test_on_a_full_disk_leaves_the_older_adapter_as_it_was(self, saved, num_bytes):
        model, folder, before = saved
        with disk_full_at(num_bytes), pytest.raises(Exception, match=r"(?i)file too large"):
            model.save_pretrained(folder)
        assert self.files(folder) == before

    def test_of_nan_is_refused_and_leaves_the_older_adapter_as_it_was(self, saved):
        model, folder, before = saved
        vectors_of(model).data[1, 2] = float("nan")
        with pytest.raises(ValueError, match="'default' is not saved, since .*learnable_embeddings' holds NaN or Inf"):
            model.save_pretrained(folder)
        assert self.files(folder) == before

    def test_with_other_settings_is_never_half_one_and_half_the_other(self, saved, monkeypatch):
        model, folder, before = saved
        model.set_class_names([*CLASS_NAMES[::-1]])
        replace, replaced = kill_and_resume.os.replace, []

        def die_after_the_first(source, target):
            if replaced:
                raise KeyboardInterrupt
            replaced.append(target)
            replace(source, target)

        monkeypatch.setattr("os.replace", die_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
        with pytest.raises(OSError, match="adapter_config.json"):
            AutoPeftModelForPromptClassification.from_pretrained(folder)

    def test_replaces_a_link_and_not_what_it_leads_to(self, saved, tmp_path):
        model, folder, before = saved
        (tmp_path / "elsewhere").write_text("mine")
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
        model.save_pretrained(folder)
        assert (tmp_path / "elsewhere").read_text() == "mine"
        assert torch.equal(vectors_in(folder), vectors_of(model))

    def test_into_a_file_is_refused(self, saved, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="saved into a folder, but .*file' is a file"):
            saved[0].save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestNaN:
    @pytest.fixture(autouse=True)
    def diverging(self, monkeypatch):
        """The second step finds Inf in what is trained."""
        training_step = Trainer.training_step

        def diverge_at_the_second_step(trainer, *args, **kwargs):
            if trainer.state.global_step == 1:
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter.data.fill_(float("inf"))
            return training_step(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", diverge_at_the_second_step)

    @pytest.mark.parametrize("callbacks", [[StopAtNonFinite()], []])
    def test_stops_the_training_and_leaves_the_last_good_checkpoint(
        self, classifier, pixel_values, tmp_path, callbacks
    ):
        data = [{"pixel_values": image, "labels": index} for index, image in enumerate(pixel_values)]
        args = TrainingArguments(
            tmp_path, max_steps=4, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = Trainer(tuned(classifier), args, train_dataset=data, callbacks=callbacks)
        error = FloatingPointError if callbacks else ValueError  # without it, at the first attempt to save
        with pytest.raises(error, match="NaN or Inf.*lower learning rate"):
            trainer.train()
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert vectors_in(tmp_path / "checkpoint-1").isfinite().all()

    def test_is_told_by_the_example_in_one_message(self, run_here, tmp_path):
        with pytest.raises(SystemExit) as exit:
            run_here(COMMAND, *CHECKPOINTS, "--output_dir", "out")
        message = exit.value.code
        assert message.startswith(f"{PROGRAM}: error: NaN or Inf in 1 of the trained tensors")
        assert "after step 2" in message and message.endswith("The last checkpoint is 'out/seed1/checkpoint-1'.")
        assert not (tmp_path / "out/seed1/adapter_model.safetensors").exists()


class TestUnreadableImage:
    @pytest.fixture(params=[b"no image", b"", "cut"])
    def images(self, request, tmp_path):
        """A folder of images, of which one is damaged."""
        dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
        for index in range(12):
            path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset[index]["image"].save(path)
        path = tmp_path / "images/dog/5.png"
        path.write_bytes(path.read_bytes()[:200] if request.param == "cut" else request.param)
        return tmp_path / "images"

    @pytest.mark.parametrize("augment", [[], ["--augment"]])
    def test_is_named_with_what_to_do(self, run_here, images, augment, tmp_path):
        source = ["--train_dir", images, "--shots", 0, "--model_name_or_path", TINY_CLIP, "--train_val_split", 0.2]
        with pytest.raises(SystemExit) as exit:
            run_here(COMMAND, *SMALL, *source, *augment, "--output_dir", "out")
        message = exit.value.code
        assert message.startswith(f"{PROGRAM}: error: Cannot read ") and str(images / "dog/5.png") in message
        assert "it is damaged, or no image" in message and message.endswith(
            "Replace the file, or remove it."
        )  # nothing is lost yet, so nothing to continue
        assert not (tmp_path / "out").exists()


def test_an_image_without_a_name_that_cannot_be_read_is_told_with_its_length(classifier):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(2))
    table = dataset.to_pandas()
    table.at[1, "image"] = {"bytes": b"broken", "path": None}
    broken = type(dataset).from_pandas(table, features=dataset.features)
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    for read in (
        lambda: cache_image_embeds(broken, classifier, image_processor),
        lambda: with_pixel_values(broken, image_processor)[1],
    ):
        with pytest.raises(UnreadableImageError, match="Cannot read an image of 6 bytes: it is damaged"):
            read()


class TestOutOfMemoryInAChunk:
    @pytest.fixture
    def model(self, classifier):
        classifier.class_encoder.batch_size = 1
        return tuned(classifier).train()

    def fail_at(self, model, call):
        """The text tower raises at its n-th call from now on."""
        calls = []

        def fail(module, args, kwargs):
            calls.append(args)
            if len(calls) == call:
                raise torch.OutOfMemoryError("out of memory (simulated)")

        return model.text_model.encoder.register_forward_pre_hook(fail, with_kwargs=True)

    def step(self, model, pixel_values, labels):
        model.zero_grad()
        loss = model(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        return loss.item(), vectors_of(model).grad.clone()

    @pytest.mark.parametrize("call", [1, 3, 4, 5, 7])  # four chunks forward, then three of them again
    def test_leaves_a_model_whose_next_step_is_as_if_nothing_had_been(self, model, pixel_values, labels, call):
        loss, gradient = self.step(model, pixel_values, labels)
        hook = self.fail_at(model, call)
        with pytest.raises(torch.OutOfMemoryError):
            self.step(model, pixel_values, labels)
        hook.remove()
        again = self.step(model, pixel_values, labels)
        assert again[0] == loss and torch.equal(again[1], gradient)

    def test_while_evaluating_keeps_nothing_half_made(self, model, pixel_values):
        with torch.no_grad():
            expected = model.eval()(pixel_values=pixel_values).logits
            model.get_base_model().class_encoder.clear()
            hook = self.fail_at(model, 2)
            with pytest.raises(torch.OutOfMemoryError):
                model(pixel_values=pixel_values)
            hook.remove()
            assert torch.equal(model(pixel_values=pixel_values).logits, expected)

    def test_is_told_by_the_example_with_what_to_try(self, run_here, monkeypatch, caplog):
        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("out of memory (simulated)")

        monkeypatch.setattr(Trainer, "training_step", fail)
        with pytest.raises(torch.OutOfMemoryError):
            run_here(COMMAND, *SMALL, "--output_dir", "out")
        assert "Try a smaller --per_device_train_batch_size" in caplog.text
        assert "There is no checkpoint to continue from. With --save_strategy epoch there are" in caplog.text
