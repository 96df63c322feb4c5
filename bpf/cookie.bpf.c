// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The cookie of a network namespace, for kernels that do not tell it to user space (before 5.14). Who wants
 * to know makes an entry for an address of his choice, and connects a socket of that namespace to it.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

struct asked_key {
	__be32 address;
	__u32 port; /* of the context: network order in the lower half */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, struct asked_key);
	__type(value, __u64);
} cookies SEC(".maps");

SEC("cgroup/connect4")
int pykmesh_cookie(struct bpf_sock_addr *ctx)
{
	struct asked_key key = { .address = ctx->user_ip4, .port = ctx->user_port };
	__u64 cookie = bpf_get_netns_cookie(ctx);

	bpf_map_update_elem(&cookies, &key, &cookie, BPF_EXIST);
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
