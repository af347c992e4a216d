"""Wrong gradients and lost runs that the field has shipped, each with what sees it here.

From public issues, in the order of what they break. seen_by: plants of `tests/matrix/plants.py` by name, and tests by
file and name. absent: why nothing here can go wrong in that way, where that is so.
"""

import dataclasses

OF_RUNS = "tests/matrix/test_known_bugs_of_runs.py"


@dataclasses.dataclass(frozen=True)
class Bug:
    source: str
    what: str
    seen_by: tuple[str, ...] = ()
    absent: str = ""


BUGS = (
    Bug(
        "Megatron-LM #7452, repro 11",
        "the norm of gated DeltaNet's heads is a replica that sees a rank's heads only, and is not reduced",
        ("output_norm_of_gated_deltanet_not_reduced",),
    ),
    Bug("Megatron-LM #7452", "gathered logits in the split loss", ("gathered_logits_fed_to_the_split_loss",)),
    Bug(
        "Megatron-LM #7452, repro 4",
        "a head for several tokens is recomputed in another tensor group; without such heads, a layer is",
        ("layers_run_again_in_another_group",),
    ),
    Bug(
        "Megatron-LM #1446",
        "the final norm's gradient differs between tensor ranks",
        ("final_norm_differs_between_tensor_ranks", "tests/parallel/test_replicas.py::test_one_bit_is_found"),
    ),
    Bug(
        "bigcode/Megatron-LM #35",
        "a key/value head on several tensor ranks: gradients are not summed",
        ("replicated_key_value_heads_not_summed",),
    ),
    Bug(
        "Megatron-LM #673, #3959; verl #6609",
        "the loss or its gradient is scaled by the number of context ranks",
        ("loss_scaled_by_the_context_size",),
    ),
    Bug(
        "Megatron-LM #3672, #3768, #5047",
        "how much the auxiliary loss counts depends on the mesh",
        ("auxiliary_loss_counts_local_tokens_only",),
    ),
    Bug(
        "torchtitan #2972",
        "under pipelines gradients are larger by the number of tokens",
        ("gradients_larger_by_the_number_of_tokens_under_pipelines",),
    ),
    Bug(
        "torchtitan #1805, #1878, #4054",
        "what is gathered has no reduction in its backward pass",
        ("gathered_input_without_a_reduction_in_backward",),
    ),
    Bug(
        "pytorch #160285; megablocks #86",
        "gradients of experts are scaled by the number of their ranks",
        ("expert_gradients_doubled",),
    ),
    Bug(
        "transformers #48687",
        "the router's gradient is wrong and the loss is right",
        ("router_gradient_wrong_while_the_loss_is_right",),
    ),
    Bug(
        "torchtitan #1373",
        "the rotary key that all heads of latent attention share",
        ("shared_rotary_key_of_latent_attention_not_reduced",),
    ),
    Bug("torchtitan #1593", "statistics of loads count twice", ("load_statistics_counted_twice",)),
    Bug("torchtitan #3686", "balance is updated per micro-batch", ("balance_bias_updated_per_micro_batch",)),
    Bug("torchtitan #4494", "the update passes over layers", ("balance_bias_of_some_layers_not_updated",)),
    Bug(
        "torchtitan #1689",
        "a stage without experts ends in an error",
        ("tests/matrix/test_matrix.py::test_stages_without_experts",),
    ),
    Bug("torchtitan #1842, #2206", "the loss is a mean of the ranks' means", ("loss_averaged_per_rank",)),
    Bug("OLMo-core", "stages of a rank begin with the same weights", ("pipeline_chunks_initialised_alike",)),
    Bug(
        "OLMo-core",
        "initial weights do not go by depth",
        (f"{OF_RUNS}::test_depth_scaled_initialisation_never_applied",),
    ),
    Bug("OLMo-core", "MFU is off by two", (f"{OF_RUNS}::test_flops_off_by_two",)),
    Bug(
        "our own first sketch",
        "gradients are summed after every micro-batch",
        ("token_wise_gradients_summed_after_every_micro_batch",),
    ),
    Bug(
        "WeatherGenerator #2724",
        "rank 0 alone decides to leave a step out",
        ("one_rank_keeps_its_own_gradient", f"{OF_RUNS}::test_rank_0_alone_decides_to_skip"),
    ),
    Bug(
        "Megatron-LM #1842; DeepSpeed #6691",
        "a resumed run has another optimiser state",
        (
            f"{OF_RUNS}::test_resume_forgets_the_optimiser",
            "tests/trainer/test_engine_runs.py::test_what_is_resumed_is_what_was_never_stopped",
        ),
    ),
    Bug(
        "torchtitan #816; Megatron-Bridge #5637",
        "which samples come depends on the number of ranks",
        ("data_split_wrongly", f"{OF_RUNS}::test_samples_depend_on_the_number_of_ranks"),
    ),
    Bug(
        "torchtitan #909, #930; pocket-tts #262",
        "old checkpoints go before the new one is there",
        (f"{OF_RUNS}::test_old_checkpoints_go_before_the_new_one_is_there",),
    ),
    Bug(
        "KempnerForge #102",
        "a run of NaN goes on and prunes what was healthy",
        (f"{OF_RUNS}::test_a_run_of_nan_goes_on_and_prunes",),
    ),
    Bug(
        "verl #7952; maxtext #5260",
        "a resumed run starts from scratch in silence",
        (f"{OF_RUNS}::test_resume_starts_anew_in_silence",),
    ),
    Bug(
        "goodfire #741; Automodel #3007",
        "SIGTERM is not honoured in some phases",
        (
            f"{OF_RUNS}::test_a_signal_is_not_honoured",
            "tests/trainer/test_signals.py::test_a_process_that_gets_sigterm_exits_with_0",
        ),
    ),
    Bug(
        "torch 2.13",
        "FSDP per layer under a schedule that splits the backward pass",
        ("fsdp_per_layer_under_a_split_backward",),
    ),
    Bug(
        "torch 2.13",
        "DDP under a schedule that splits the backward pass",
        absent="replicas are summed once per step by `parallel/gradients.py`; nothing here wraps a stage in DDP",
    ),
    Bug("torch 2.13", "one function over several units of FSDP", ("one_function_over_several_fsdp_units",)),
    Bug(
        "our own, with torch 2.13",
        "gradients of a split backward pass are views, which a fused optimiser misreads",
        ("gradients_of_a_split_backward_as_torch_lays_them_out",),
    ),
    Bug("our own", "copies of a tied embedding drift apart", ("tied_embedding_not_summed_over_stages",)),
)
