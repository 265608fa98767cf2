// Nodes of llama.cpp's graphs put together.
//
// A step of one row has hundreds of nodes that take a microsecond or two, and after each of them all threads wait for
// one another. Here they become stages: products of the same activations are one, with the RMS norm before them and
// what is added to them or gated by them after; what rotates and keeps keys, queries and values of few rows is another.
// Threads meet six to eight times a layer in place of 26, and one that is done with a stage asks for the next one's
// weights. The numbers are those of the nodes.
//
// llama.cpp's own loop computes a list of nodes in which ours stand for those that were put together. Its allocator
// takes a result's memory again after the last use, in the order of its nodes. So what is computed before its turn
// (keys and values, beside queries) goes to memory of ours, and nodes stay as they are where one would write what
// another thread may still read.

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "products.h"
#include "traits.h"

extern "C" {
ggml_status edge_graph_compute(ggml_cgraph * graph, ggml_cplan * plan);
bool edge_extra_compute_forward(ggml_compute_params * params, ggml_tensor * node);
}

#if EDGE_PRODUCTS

#include "ops.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

namespace {

using edge::Product;
using edge::Stage;

constexpr int FEW_ROWS = 16;  // of a chain, which is one thread's
constexpr int WINDOW = 48;    // nodes that are looked through for what belongs to one

// Nodes that one thread computes, one after the other.
struct Chain {
    static constexpr int MOST = 4;
    ggml_tensor * nodes[MOST];
    int count = 0;
};

char MARK;  // `extra` of our nodes points here

// Stands in the list of nodes for those put together: a stage, or chains.
struct Step {
    ggml_tensor node;
    Stage stage;
    Chain chains[Chain::MOST];
    int chained = 0;
    char * work = nullptr;  // of the chains
    size_t each = 0;        // bytes of it for one

    explicit Step(const ggml_tensor * first) : node(*first) { node.extra = &MARK; }

    void run(const ggml_compute_params * params) const {
        if (chained == 0) {
            stage.run(params);
            return;
        }
        for (int c = params->ith; c < chained; c += params->nth) {
            const ggml_compute_params own = {0, 1, each, work + c * each, params->threadpool, params->use_ref};
            for (int i = 0; i < chains[c].count; ++i) {
                ggml_tensor * const link = chains[c].nodes[i];
                const bool rope = link->op == GGML_OP_ROPE;
                (rope ? ggml_compute_forward_rope : ggml_compute_forward_set_rows)(&own, link);
            }
        }
    }
};

// Memory that only grows, taken anew for each graph.
class Memory {
  public:
    void reset() { size_ = 0; }
    void need(size_t size) { size_ = std::max(size_, size); }
    char * get() {
        memory_.resize(std::max(memory_.size(), size_ + LINE));
        return (char *) (((uintptr_t) memory_.data() + LINE - 1) / LINE * LINE);
    }

  private:
    static constexpr size_t LINE = 64;
    std::vector<char> memory_;
    size_t size_ = 0;
};

bool apart(const ggml_tensor * a, const ggml_tensor * b) {
    const char *x = (const char *) a->data, *y = (const char *) b->data;
    return x + ggml_nbytes(a) <= y || y + ggml_nbytes(b) <= x;
}

// Whether a node could write the one while another thread reads the other: element by element they may be the same.
bool safe(const ggml_tensor * written, const ggml_tensor * read) {
    return apart(written, read) || (written->data == read->data && ggml_are_same_stride(written, read));
}

bool rows_of_floats(const ggml_tensor * tensor) {
    return tensor->type == GGML_TYPE_F32 && ggml_is_contiguous(tensor) && tensor->ne[2] * tensor->ne[3] == 1;
}

// What a node of two operands has beside `one`; null if that is none of them, or both.
const ggml_tensor * beside(const ggml_tensor * node, const ggml_tensor * one) {
    if ((node->src[0] == one) == (node->src[1] == one)) {
        return nullptr;
    }
    return node->src[node->src[0] == one ? 1 : 0];
}

bool few_rows_of_chain(const ggml_tensor * node) {
    return (node->op == GGML_OP_ROPE && node->ne[2] * node->ne[3] <= FEW_ROWS) ||
           (node->op == GGML_OP_SET_ROWS && ggml_nrows(node->src[0]) <= FEW_ROWS);
}

// Whether the nodes can be computed at the same time.
bool independent(const ggml_tensor * a, const ggml_tensor * b) {
    auto written_apart = [](const ggml_tensor * written, const ggml_tensor * other) {
        return std::all_of(other->src, other->src + GGML_MAX_SRC, [&](const ggml_tensor * source) {
            return source == nullptr || apart(written, source);
        });
    };
    return apart(a, b) && written_apart(a, b) && written_apart(b, a);
}

class Plan {
  public:
    // False where there is nothing to put together. threads: that will compute, at most.
    bool make(const ggml_cgraph * graph, int threads) {
        graph_ = graph;
        threads_ = threads;
        last_ = nullptr;
        steps_.clear();
        moved_.clear();
        nodes_.clear();
        real_.clear();
        work_.reset();
        for (Region & region : regions_) {
            region.memory.reset();
            region.free_from = 0;
        }
        for (int i = 0; i < graph->n_nodes; ++i) {
            const ggml_tensor * const node = graph->nodes[i];
            if (!ggml_op_is_empty(node->op) && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0) {
                real_.push_back({i, false});
            }
        }
        for (size_t i = 0; i < real_.size(); ++i) {
            if (!real_[i].done && !put_stage_together(i)) {
                nodes_.push_back(at(i));
            }
        }
        if (steps_.empty()) {
            return false;
        }
        for (Moved & moved : moved_) {
            moved.data = regions_[moved.region].memory.get() + moved.offset;
        }
        swap();
        put_chains_together();
        for (Step & step : steps_) {
            step.work = step.stage.work = work_.get();
        }
        shorter_ = *graph;
        shorter_.nodes = nodes_.data();
        shorter_.n_nodes = (int) nodes_.size();
        return true;
    }

    ggml_cgraph * graph() { return &shorter_; }

    // Lets llama.cpp's tensors be as they were.
    void undo() { swap(); }

  private:
    // A node that computes something, by its place in llama.cpp's list.
    struct Real {
        int place;
        bool done;
    };
    // A tensor that lies in a region while the graph is computed, where it would lie in llama.cpp's memory.
    struct Moved {
        ggml_tensor * tensor;
        int region;
        size_t offset;
        void * data;
    };
    struct Region {
        Memory memory;
        int free_from;  // place
    };
    // What goes to a region, or a view of it, and how often it was seen to be used.
    struct Result {
        ggml_tensor * tensor;
        size_t offset;
        int uses;
    };

    const ggml_cgraph * graph_;
    int threads_;
    Stage * last_;
    std::deque<Step> steps_;
    std::vector<Moved> moved_;
    std::vector<ggml_tensor *> nodes_;
    std::vector<Real> real_;
    std::vector<size_t> found_;
    std::vector<Result> results_;
    Memory work_;
    Region regions_[2];
    ggml_cgraph shorter_;

    ggml_tensor * at(size_t i) const { return graph_->nodes[real_[i].place]; }
    bool is(size_t i, ggml_op op) const { return i < real_.size() && !real_[i].done && at(i)->op == op; }
    bool used_only(size_t i, int times) const { return ggml_node_has_n_uses(graph_, real_[i].place, times); }

    void swap() {
        for (Moved & moved : moved_) {
            std::swap(moved.tensor->data, moved.data);
        }
    }

    int uses(const ggml_tensor * tensor) const {
        const size_t slot = ggml_hash_find(&graph_->visited_hash_set, tensor);
        return ggml_bitset_get(graph_->visited_hash_set.used, slot) ? graph_->use_counts[slot] : 0;
    }

    // Whether a stage now stands for the nodes that begin here.
    bool put_stage_together(size_t i) {
        // Not before the last node: who asks llama.cpp for single nodes gets each as a graph's last one, and may look
        // at what it was given.
        const bool normed =
            i + 3 < real_.size() && is(i, GGML_OP_RMS_NORM) && is(i + 1, GGML_OP_MUL) && used_only(i, 1);
        const size_t first = normed ? i + 2 : i;
        if (!product_of(first, nullptr)) {
            return false;
        }
        const ggml_tensor * const input = at(first)->src[1];
        Step & step = steps_.emplace_back(at(first));
        Stage & stage = step.stage;
        stage.input = input;
        stage.rows = (int) input->ne[1];
        if ((normed && !put_norm(stage, at(i), at(i + 1))) || !put_products(stage, i, first)) {
            steps_.pop_back();
            return false;
        }
        for (size_t k = i; k < first; ++k) {
            real_[k].done = true;
        }
        work_.need(stage.divide(threads_));
        if (last_ != nullptr) {
            last_->then = &stage;
        }
        last_ = &stage;
        nodes_.push_back(&step.node);
        return true;
    }

    // A product for a stage, of this input if one is given.
    bool product_of(size_t i, const ggml_tensor * input) const {
        return is(i, GGML_OP_MUL_MAT) && edge::is_product(at(i)) && (input == nullptr || at(i)->src[1] == input) &&
               rows_of_floats(at(i)->src[1]) && rows_of_floats(at(i));
    }

    static bool put_norm(Stage & stage, const ggml_tensor * norm, const ggml_tensor * scaled) {
        const ggml_tensor * const weight = beside(scaled, norm);
        if (weight == nullptr || stage.input != scaled || !rows_of_floats(weight) || weight->ne[1] != 1 ||
            weight->ne[0] != norm->ne[0] || !rows_of_floats(norm->src[0])) {
            return false;
        }
        stage.input = norm->src[0];
        stage.norm = weight;
        memcpy(&stage.eps, norm->op_params, sizeof stage.eps);
        return true;
    }

    // The products from `first` on; the stage begins with the node `begin`, the same one or the norm's.
    bool put_products(Stage & stage, size_t begin, size_t first) {
        const ggml_tensor * const input = at(first)->src[1];
        found_.clear();
        for (size_t k = first; k < real_.size() && real_[k].place < real_[first].place + WINDOW; ++k) {
            if (found_.size() < Stage::MOST && product_of(k, input)) {
                found_.push_back(k);
            }
        }
        // What is normalised in the stage is nowhere else.
        auto all = [&](size_t count) { return begin == first || used_only(first - 1, (int) count); };
        return (all(2) && put_gate(stage, first)) || (all(found_.size()) && put_all(stage, real_[begin].place)) ||
               (all(1) && put_one(stage, first));
    }

    // silu(one product) times another.
    bool put_gate(Stage & stage, size_t first) {
        if (!product_of(first + 1, at(first)->src[1]) || !is(first + 2, GGML_OP_GLU)) {
            return false;
        }
        ggml_tensor * const glu = at(first + 2);
        const ggml_tensor *const gate = glu->src[0], *const up = glu->src[1];
        const bool these = (gate == at(first) && up == at(first + 1)) || (gate == at(first + 1) && up == at(first));
        if (!these || ggml_get_glu_op(glu) != GGML_GLU_OP_SWIGLU || !used_only(first, 1) || !used_only(first + 1, 1) ||
            !rows_of_floats(glu) || !apart(glu, stage.input)) {
            return false;
        }
        stage.products[0] = {gate->src[0], glu};
        stage.products[1] = {up->src[0], glu, nullptr, true};
        stage.count = 2;
        stage.side_by_side = true;
        for (size_t k = first; k < first + 3; ++k) {
            real_[k].done = true;
        }
        return true;
    }

    // All products of the same input that were found. begin: the place from which the stage reads.
    bool put_all(Stage & stage, int begin) {
        if (found_.size() < 2) {
            return false;
        }
        Region * const region =
            std::find_if(regions_, regions_ + 2, [&](const Region & one) { return one.free_from <= begin; });
        if (region == regions_ + 2) {
            return false;
        }
        Product products[Stage::MOST];
        size_t size = 0;
        results_.clear();
        for (size_t i = 0; i < found_.size(); ++i) {
            products[i] = with_plus(found_[i]);
            const ggml_tensor * const plus = products[i].plus;
            if (i > 0 && plus != nullptr && plus->op != GGML_OP_NONE) {
                return false;  // it may not have been computed yet
            }
            results_.push_back({products[i].result, size, 0});
            size += GGML_PAD(ggml_nbytes(products[i].result), 64);
        }
        int last = 0;
        if (!uses_end(real_[found_[0]].place, last)) {
            return false;
        }
        region->free_from = last + 1;
        region->memory.need(size);
        for (const Result & result : results_) {
            moved_.push_back({result.tensor, (int) (region - regions_), result.offset, nullptr});
        }
        for (size_t i = 0; i < found_.size(); ++i) {
            take(stage, products[i], found_[i]);
        }
        return true;
    }

    bool put_one(Stage & stage, size_t first) {
        const Product product = with_plus(first);
        if (!apart(product.result, stage.input) || (product.plus != nullptr && !safe(product.result, product.plus))) {
            return false;
        }
        take(stage, product, first);
        return true;
    }

    void take(Stage & stage, const Product & product, size_t i) {
        stage.products[stage.count++] = product;
        real_[i].done = true;
        if (product.plus != nullptr) {
            real_[i + 1].done = true;
        }
    }

    // A product, and what the node after it adds to it and to nothing else.
    Product with_plus(size_t i) const {
        ggml_tensor * const product = at(i);
        if (is(i + 1, GGML_OP_ADD) && used_only(i, 1)) {
            ggml_tensor * const sum = at(i + 1);
            const ggml_tensor * const plus = beside(sum, product);
            if (plus != nullptr && rows_of_floats(sum) && rows_of_floats(plus) && ggml_are_same_shape(sum, product) &&
                plus->ne[0] == sum->ne[0] && (plus->ne[1] == 1 || plus->ne[1] == sum->ne[1])) {
                return {product->src[0], sum, plus};
            }
        }
        return {product->src[0], product};
    }

    // Whether all uses of the results are in the window, those of views of them too, which join them; last: the place
    // of the last one.
    bool uses_end(int first, int & last) {
        const int end = std::min(first + WINDOW, graph_->n_nodes);
        for (int place = first; place < end; ++place) {
            ggml_tensor * const node = graph_->nodes[place];
            for (int s = 0; s < GGML_MAX_SRC && node->src[s] != nullptr; ++s) {
                for (Result & result : results_) {
                    if (node->src[s] == result.tensor) {
                        ++result.uses;
                        last = place;
                    }
                }
            }
            for (size_t i = 0; node->view_src != nullptr && i < found_.size(); ++i) {
                if (node->view_src == results_[i].tensor) {
                    results_.push_back({node, results_[i].offset + node->view_offs, 0});
                    break;
                }
            }
        }
        return std::all_of(results_.begin(), results_.end(), [&](const Result & result) {
            return result.uses == uses(result.tensor) && (result.tensor->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
        });
    }

    void put_chains_together() {
        size_t to = 0;
        for (size_t from = 0; from < nodes_.size();) {
            const size_t taken = chains_at(from, to);
            if (taken == 0) {
                nodes_[to] = nodes_[from++];
            }
            from += taken;
            ++to;
        }
        nodes_.resize(to);
    }

    // Puts a step for as many nodes as can be chained `to` the list; returns their number, or 0.
    size_t chains_at(size_t from, size_t to) {
        Chain chains[Chain::MOST];
        int chained = 0;
        size_t i = from, each = 0;
        for (; i < nodes_.size() && few_rows_of_chain(nodes_[i]) && nodes_[i]->extra != &MARK; ++i) {
            ggml_tensor * const node = nodes_[i];
            Chain * const chain = chain_of(node, chains, chained);
            if (chain == nullptr) {
                break;
            }
            chain->nodes[chain->count++] = node;
            chained = std::max(chained, (int) (chain - chains) + 1);
            each = std::max(each, GGML_PAD((node->ne[0] + CACHE_LINE_SIZE_F32) * sizeof(float), 64));
        }
        if (i - from < 2) {
            return 0;
        }
        Step & step = steps_.emplace_back(nodes_[from]);
        std::copy(chains, chains + chained, step.chains);
        step.chained = chained;
        step.each = each;
        work_.need(chained * each);
        nodes_[to] = &step.node;
        return i - from;
    }

    // The chain that a node goes on with, or begins; null if it must wait for more than one, or none has room.
    static Chain * chain_of(const ggml_tensor * node, Chain * chains, int chained) {
        Chain * mine = nullptr;
        for (Chain * chain = chains; chain < chains + chained; ++chain) {
            const bool apart_from_it = std::all_of(chain->nodes, chain->nodes + chain->count,
                                                   [&](const ggml_tensor * other) { return independent(node, other); });
            if (apart_from_it) {
                continue;
            }
            if (mine != nullptr) {
                return nullptr;
            }
            mine = chain;
        }
        if (mine == nullptr) {
            return chained < Chain::MOST ? chains + chained : nullptr;
        }
        return mine->count < Chain::MOST ? mine : nullptr;
    }
};

}  // namespace

ggml_status edge_graph_compute(ggml_cgraph * graph, ggml_cplan * plan) {
    static thread_local Plan shorter;
    if (plan->use_ref || !shorter.make(graph, plan->n_threads)) {
        return ggml_graph_compute(graph, plan);
    }
    const ggml_status status = ggml_graph_compute(shorter.graph(), plan);
    shorter.undo();
    return status;
}

bool edge_extra_compute_forward(ggml_compute_params * params, ggml_tensor * node) {
    if (node->extra != &MARK) {
        return ggml_cpu_extra_compute_forward(params, node);
    }
    ((const Step *) node)->run(params);
    return true;
}

#else

ggml_status edge_graph_compute(ggml_cgraph * graph, ggml_cplan * plan) { return ggml_graph_compute(graph, plan); }

bool edge_extra_compute_forward(ggml_compute_params * params, ggml_tensor * node) {
    return ggml_cpu_extra_compute_forward(params, node);
}

#endif
