// The most likely tokens of a GGUF model after a few given ones: `decode MODEL`.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <vector>

int main(int, char ** arguments) {
    constexpr int GIVEN = 40, NEW = 24;
    llama_backend_init();
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * const model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 128;
    params.n_threads = params.n_threads_batch = 2;
    llama_context * const context = model != nullptr ? llama_init_from_model(model, params) : nullptr;
    if (context == nullptr) {
        fprintf(stderr, "%s is not loaded\n", arguments[1]);
        return 1;
    }
    const int words = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> tokens(GIVEN);
    for (int i = 0; i < GIVEN; ++i) {
        tokens[i] = 7 * i % words;
    }
    for (int i = 0; i < NEW; ++i) {
        if (llama_decode(context, llama_batch_get_one(tokens.data(), (int) tokens.size())) != 0) {
            fprintf(stderr, "token %d is not decoded\n", i);
            return 1;
        }
        const float * const logits = llama_get_logits_ith(context, -1);
        tokens = {(llama_token) (std::max_element(logits, logits + words) - logits)};
        printf("%d%c", tokens[0], i + 1 < NEW ? ' ' : '\n');
    }
    return 0;
}
