"""The slow, obvious form of what the library computes in batches."""

import torch


@torch.no_grad()
def row_nll(model, row):
    """Response NLL of one row: no batch, no padding, logits of every position."""
    ids = torch.tensor([row.prompt + row.response])
    logprobs = model(ids).logits[0].float().log_softmax(-1)
    places = range(len(row.prompt), ids.shape[1])
    return -sum(logprobs[t - 1, ids[0, t]].item() for t in places)


@torch.no_grad()
def row_answer(model, tokenizer, row, max_new_tokens):
    """Greedy answer of one row: the whole sequence computed again for every token."""
    ids = list(row.prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
