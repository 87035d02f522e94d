// Group-relative advantages on the CPU, for numpy arrays. The equations are those of kernels/group_advantage.py.
//
// The rows are cut into chunks of a fixed size. Threads fill one table of groups per chunk (Welford). The tables are
// then merged in the order of the chunks (Chan, Golub, LeVeque 1979), so the result does not depend on the number of
// threads.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr double kEpsilon = 1e-4;
constexpr std::size_t kChunkRows = std::size_t{1} << 14;
constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();

enum class Std { kGlobal, kGroup, kNone };

std::size_t num_chunks(std::size_t rows) { return rows / kChunkRows + (rows % kChunkRows != 0); }

// Mean and sum of squared deviations of the values added so far. The mean of equal values is exactly their value.
struct Moments {
    double mean = 0;
    double deviations = 0;

    void add(double value, double count_with_it) {
        const double delta = value - mean;
        mean += delta / count_with_it;
        deviations += delta * (value - mean);
    }

    void merge(const Moments& other, double count, double other_count) {
        const double delta = other.mean - mean;
        const double share = other_count / (count + other_count);
        mean += delta * share;
        deviations += other.deviations + delta * (count * share) * delta;
    }

    double std(double count) const { return std::sqrt(deviations / count); }
};

// The groups added so far, numbered in the order of their first sample: an open-addressing hash table of their ids.
class Groups {
public:
    explicit Groups(std::size_t columns) : columns_(columns), slots_(64, kEmpty) {}

    std::size_t size() const { return ids_.size(); }
    std::int64_t id(std::size_t group) const { return ids_[group]; }
    double& count(std::size_t group) { return counts_[group]; }
    Moments* moments(std::size_t group) { return moments_.data() + group * columns_; }

    std::size_t find_or_add(std::int64_t id) {
        // The samples of a group usually follow each other.
        if (last_ < ids_.size() && ids_[last_] == id) return last_;
        std::size_t slot = probe(id);
        if (slots_[slot] == kEmpty) {
            if (2 * (ids_.size() + 1) > slots_.size()) {
                grow();
                slot = probe(id);
            }
            slots_[slot] = ids_.size();
            ids_.push_back(id);
            counts_.push_back(0);
            moments_.resize(moments_.size() + columns_);
        }
        return last_ = slots_[slot];
    }

private:
    static constexpr std::size_t kEmpty = std::numeric_limits<std::size_t>::max();

    // The finaliser of SplitMix64: every bit of the id affects every bit of the slot.
    static std::uint64_t mix(std::uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        return x ^ (x >> 31);
    }

    std::size_t probe(std::int64_t id) const {
        const std::size_t mask = slots_.size() - 1;
        std::size_t slot = mix(static_cast<std::uint64_t>(id)) & mask;
        while (slots_[slot] != kEmpty && ids_[slots_[slot]] != id) slot = (slot + 1) & mask;
        return slot;
    }

    void grow() {
        slots_.assign(4 * slots_.size(), kEmpty);
        for (std::size_t group = 0; group < ids_.size(); ++group) slots_[probe(ids_[group])] = group;
    }

    std::size_t columns_;
    std::size_t last_ = kEmpty;
    std::vector<std::size_t> slots_;
    std::vector<std::int64_t> ids_;
    std::vector<double> counts_;
    std::vector<Moments> moments_;
};

// Runs work(0) ... work(count - 1) on up to `threads` threads including this one; rethrows the first exception.
template <typename Work>
void parallel_for(std::size_t count, std::size_t threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    const auto loop = [&] {
        try {
            for (std::size_t i; (i = next++) < count;) work(i);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> others;
    others.reserve(std::min(threads, count));
    try {
        while (others.size() + 1 < std::min(threads, count)) others.emplace_back(loop);
    } catch (const std::exception&) {
        // The system has no more threads: the running ones do all the work.
    }
    loop();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

// The values of one sample to normalise: its weighted sum, or with gdpo each reward. False if a reward is missing.
template <typename Real>
bool read_row(const Real* rewards, const std::vector<double>& weights, bool gdpo, double* row) {
    double total = 0;
    bool present = true;
    for (std::size_t k = 0; k < weights.size(); ++k) {
        const double reward = rewards[k];
        present &= !std::isnan(reward);
        total += weights[k] * reward;
        if (gdpo) row[k] = reward;
    }
    if (!gdpo) row[0] = total;
    return present;
}

// One table of groups per chunk. local[i] becomes the group of sample i in the table of its chunk.
template <typename Real>
std::vector<Groups> fill_tables(const Real* rewards, const std::int64_t* ids, std::size_t rows,
                                const std::vector<double>& weights, bool gdpo, std::size_t threads,
                                std::vector<std::int32_t>& local) {
    const std::size_t width = weights.size();
    const std::size_t columns = gdpo ? width : 1;
    std::vector<Groups> tables(num_chunks(rows), Groups(columns));
    parallel_for(tables.size(), threads, [&](std::size_t chunk) {
        Groups& table = tables[chunk];
        std::vector<double> row(columns);
        const std::size_t end = std::min(rows, (chunk + 1) * kChunkRows);
        for (std::size_t i = chunk * kChunkRows; i < end; ++i) {
            const std::size_t group = table.find_or_add(ids[i]);
            local[i] = static_cast<std::int32_t>(group);
            if (!read_row(rewards + i * width, weights, gdpo, row.data())) continue;
            const double count = ++table.count(group);
            for (std::size_t k = 0; k < columns; ++k) table.moments(group)[k].add(row[k], count);
        }
    });
    return tables;
}

// Merges the tables in their order. merged[chunk][i] becomes the group of entry i of a chunk's table.
void merge_tables(std::vector<Groups>& tables, std::size_t columns, Groups& groups,
                  std::vector<std::vector<std::size_t>>& merged) {
    for (std::size_t chunk = 0; chunk < tables.size(); ++chunk) {
        Groups& table = tables[chunk];
        merged[chunk].reserve(table.size());
        for (std::size_t from = 0; from < table.size(); ++from) {
            const std::size_t to = groups.find_or_add(table.id(from));
            merged[chunk].push_back(to);
            if (table.count(from) == 0) continue;
            for (std::size_t k = 0; k < columns; ++k)
                groups.moments(to)[k].merge(table.moments(from)[k], groups.count(to), table.count(from));
            groups.count(to) += table.count(from);
        }
    }
}

// The standard deviation of each column over all groups.
std::vector<double> global_stds(Groups& groups, std::size_t columns) {
    double count = 0;
    std::vector<Moments> all(columns);
    for (std::size_t group = 0; group < groups.size(); ++group) {
        if (groups.count(group) == 0) continue;
        for (std::size_t k = 0; k < columns; ++k) all[k].merge(groups.moments(group)[k], count, groups.count(group));
        count += groups.count(group);
    }
    std::vector<double> stds(columns);
    for (std::size_t k = 0; k < columns; ++k) stds[k] = all[k].std(count);
    return stds;
}

template <typename Real>
void advantages(const Real* rewards, const std::int64_t* ids, std::size_t rows, const std::vector<double>& weights,
                Std std, bool gdpo, std::size_t threads, double* out) {
    const std::size_t width = weights.size();
    const std::size_t columns = gdpo ? width : 1;
    std::vector<std::int32_t> local(rows);
    std::vector<Groups> tables = fill_tables(rewards, ids, rows, weights, gdpo, threads, local);
    Groups groups(columns);
    std::vector<std::vector<std::size_t>> merged(tables.size());
    merge_tables(tables, columns, groups, merged);
    std::vector<double> global(columns, 0);
    if (std == Std::kGlobal) global = global_stds(groups, columns);

    parallel_for(tables.size(), threads, [&](std::size_t chunk) {
        std::vector<double> row(columns);
        const std::size_t end = std::min(rows, (chunk + 1) * kChunkRows);
        for (std::size_t i = chunk * kChunkRows; i < end; ++i) {
            if (!read_row(rewards + i * width, weights, gdpo, row.data())) {
                out[i] = kMissing;
                continue;
            }
            const std::size_t group = merged[chunk][static_cast<std::size_t>(local[i])];
            double total = 0;
            for (std::size_t k = 0; k < columns; ++k) {
                const Moments& moments = groups.moments(group)[k];
                double advantage = row[k] - moments.mean;
                if (std == Std::kGroup) advantage /= moments.std(groups.count(group)) + kEpsilon;
                if (std == Std::kGlobal) advantage /= global[k] + kEpsilon;
                total += gdpo ? weights[k] * advantage : advantage;
            }
            out[i] = total;
        }
    });
}

std::string shape_of(const py::array& array) { return py::str(py::object(array.attr("shape"))); }

// The data of an array whose dtype is T; checks that it can be read like a C array.
template <typename T>
const T* data_of(const py::array& array, const char* name) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
    if (!aligned || !(array.flags() & py::array::c_style))
        throw py::value_error(std::string(name) + " must be C-contiguous and aligned");
    return static_cast<const T*>(array.data());
}

py::array_t<double> group_advantages(const py::array& rewards, const py::array& group_ids,
                                     const std::vector<double>& weights, const std::string& std_name, bool gdpo,
                                     std::int64_t threads) {
    if (rewards.ndim() != 2 || group_ids.ndim() != 1 || rewards.shape(0) != group_ids.shape(0))
        throw py::value_error("rewards " + shape_of(rewards) + " and group_ids " + shape_of(group_ids) +
                              " must be (N, K) and (N,)");
    if (weights.empty() || static_cast<py::ssize_t>(weights.size()) != rewards.shape(1))
        throw py::value_error("rewards " + shape_of(rewards) + " need one weight per column, got " +
                              std::to_string(weights.size()));
    if (!py::isinstance<py::array_t<std::int64_t>>(group_ids))
        throw py::type_error("group_ids must be int64, got " + std::string(py::str(group_ids.dtype())));
    const bool single = py::isinstance<py::array_t<float>>(rewards);
    if (!single && !py::isinstance<py::array_t<double>>(rewards))
        throw py::type_error("rewards must be float32 or float64, got " + std::string(py::str(rewards.dtype())));
    if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
    Std std;
    if (std_name == "global") std = Std::kGlobal;
    else if (std_name == "group") std = Std::kGroup;
    else if (std_name == "none") std = Std::kNone;
    else throw py::value_error("unknown std \"" + std_name + "\": choose global, group or none");

    const std::int64_t* ids = data_of<std::int64_t>(group_ids, "group_ids");
    const std::size_t rows = static_cast<std::size_t>(rewards.shape(0));
    py::array_t<double> out(rewards.shape(0));
    double* advantage = out.mutable_data();
    const auto run = [&](const auto* values) {
        const py::gil_scoped_release release;
        advantages(values, ids, rows, weights, std, gdpo, static_cast<std::size_t>(threads), advantage);
    };
    if (single) run(data_of<float>(rewards, "rewards"));
    else run(data_of<double>(rewards, "rewards"));
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Group advantages on the CPU; called through fastflowgrpo.group_advantages.";
    module.def("group_advantages", &group_advantages, py::arg("rewards"), py::arg("group_ids"), py::arg("weights"),
               py::arg("std"), py::arg("gdpo"), py::arg("threads"),
               R"(Advantages (N,), float64: NaN where a reward is missing.

Args:
    rewards: float32 or float64 (N, K), C-contiguous and aligned; a row with NaN in any column is missing.
    group_ids: int64 (N,), C-contiguous and aligned, any values.
    weights: K numbers.
    std: "global", "group" or "none".
    gdpo: normalise each reward and then sum with the weights, instead of normalising the weighted sum.
    threads: maximum number of threads; the result does not depend on it.

Raises:
    TypeError: a dtype is wrong.
    ValueError: shapes do not fit, an array is not contiguous, `std` is unknown, or threads is below 1.)");
}
