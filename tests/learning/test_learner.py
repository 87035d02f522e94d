import torch
from support.pipelines import perturb

from fastflowgrpo import Trainer
from fastflowgrpo.config import Config, EvaluationConfig, PromptsConfig, RolloutConfig, UpdateConfig


def test_updates_are_adamw_and_the_moving_average_as_written_out_in_float64(tmp_path):
    rate, (beta1, beta2), decay, ema_decay = 1e-3, (0.8, 0.95), 0.1, 0.5
    config = Config(
        output_dir=str(tmp_path / "run"),
        trackers=[],
        prompts=PromptsConfig(per_epoch=4),
        rollout=RolloutConfig(group_size=4, batch_size=8, num_steps=5, window_size=2, window_start=(0, 3)),
        update=UpdateConfig(
            per_epoch=1,
            batch_size=8,
            learning_rate=rate,
            betas=(beta1, beta2),
            weight_decay=decay,
            max_grad_norm=1e-3,
            ema_decay=ema_decay,
            ema_every=1,
        ),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards={"jpeg_compressibility": 1},
    )
    learner = (trainer := Trainer(config)).learner
    perturb(learner.parameters, 0.01, seed=0)
    learner.ema.shadow_params = [parameter.detach().clone() for parameter in learner.parameters]
    batch, _ = trainer.collect(0)
    weights = [parameter.detach().double() for parameter in learner.parameters]
    average = [weight.clone() for weight in weights]
    mean, square = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in (1, 2):
        learner.accumulate(batch, trainer.objective.micro_batches(batch, 0, len(batch.advantages)))
        gradients = [None if p.grad is None else p.grad.double() for p in learner.parameters]
        learner.optimizer.zero_grad()
        norm = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item()
        assert norm > 1e-3
        share = min(ema_decay, step / (9 + step)) if step > 1 else 0.0
        for i, gradient in enumerate(gradients):
            if gradient is not None:  # AdamW leaves the others as they are
                gradient *= 1e-3 / norm
                mean[i] = beta1 * mean[i] + (1 - beta1) * gradient
                square[i] = beta2 * square[i] + (1 - beta2) * gradient**2
                change = mean[i] / (1 - beta1**step) / ((square[i] / (1 - beta2**step)).sqrt() + 1e-8)
                weights[i] = weights[i] - rate * (change + decay * weights[i])
            average[i] = share * average[i] + (1 - share) * weights[i]
        learner.update(batch)
        for expected, tensors in ((weights, learner.parameters), (average, learner.ema.shadow_params)):
            for value, tensor in zip(expected, tensors, strict=True):
                torch.testing.assert_close(tensor.detach().double(), value, rtol=1e-5, atol=2e-6)
