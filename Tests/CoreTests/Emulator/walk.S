// A machine of its own that lets an emulator's processor walk tables: it runs a guest on them with SVM, one instruction
// for each access that it is asked for, and tells what came of it. The guest's own paging, nested paging, or both are on,
// as the registers that it is given say. Source: AMD APM volume 2, "Secure Virtual Machine"; Multiboot specification
// 0.6.96.
//
// In memory when it starts, 8 bytes each:
//   0x2000000: number of accesses, flags (bit 0: nested paging, bit 1: five levels of the host's own), nCR3, the guest's
//   CR0, CR3, CR4, EFER
//   then of each access: RIP, RBX, RFLAGS, code segment, data segments (15:0 selector, 31:16 attributes, 33:32 CPL)
//   the tables, where the registers say
// It leaves at 0x3000000, of each access: exit code, EXITINFO1, EXITINFO2, RAX, RIP. Then it ends the emulator.

        .set JOBS, 0x2000000
        .set ANSWERS, 0x3000000
        .set VMCB, 0x200000
        .set HOST_SAVE, 0x201000
        .set TABLES, 0x202000
        .set STACK, 0x210000

        .code32
        .section .text
        .align 4
header:
        .long 0x1badb002
        .long 0x00010000
        .long 0xe4514ffe
        .long header
        .long 0x100000
        .long 0
        .long 0
        .long start

        .global start
start:
        cli
        movl $STACK, %esp
        // One gigabyte one to one, in large pages, below four levels or five.
        movl $TABLES, %edi
        xorl %eax, %eax
        movl $4096, %ecx
        rep stosl
        movl $(TABLES + 0x1003), TABLES
        movl $(TABLES + 0x2003), TABLES + 0x1000
        movl $(TABLES + 0x0003), TABLES + 0x3000
        xorl %ecx, %ecx
1:      movl %ecx, %eax
        shll $21, %eax
        orl $0x83, %eax
        movl %eax, TABLES + 0x2000(, %ecx, 8)
        incl %ecx
        cmpl $512, %ecx
        jne 1b
        movl $0x20, %eax
        movl $TABLES, %ebx
        testl $2, JOBS + 8
        jz 2f
        movl $0x1020, %eax
        movl $(TABLES + 0x3000), %ebx
2:      movl %eax, %cr4
        movl %ebx, %cr3
        // LME, NXE, SVME
        movl $0xc0000080, %ecx
        xorl %edx, %edx
        movl $0x1900, %eax
        wrmsr
        movl $0x80000011, %eax
        movl %eax, %cr0
        lgdt gdtr
        ljmp $8, $long

        .code64
long:
        movl $16, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $0xc0010117, %ecx
        xorl %edx, %edx
        movl $HOST_SAVE, %eax
        wrmsr
        movq $ANSWERS, %r15
        movq $JOBS, %r14
        movq (%r14), %r13
        leaq 56(%r14), %r12
next:
        testq %r13, %r13
        jz done
        movq $VMCB, %rdi
        xorl %eax, %eax
        movl $512, %ecx
        rep stosq
        movq $VMCB, %rbp
        // Intercepted: #GP, #PF; HLT, shutdown; VMRUN.
        movl $0x6000, 0x08(%rbp)
        movl $0x81000000, 0x0c(%rbp)
        movl $1, 0x10(%rbp)
        movl $1, 0x58(%rbp)
        movb $1, 0x5c(%rbp)
        movq 8(%r14), %rax
        andl $1, %eax
        movq %rax, 0x90(%rbp)
        movq 16(%r14), %rax
        movq %rax, 0xb0(%rbp)
        // Flat segments.
        movq 32(%r12), %rbx
        movq $0x400, %rdx
segment:
        movl %ebx, (%rbp, %rdx)
        movl $0xffffffff, 4(%rbp, %rdx)
        addq $16, %rdx
        cmpq $0x460, %rdx
        jne segment
        movl 24(%r12), %eax
        movl %eax, 0x410(%rbp)
        movw $0x82, 0x472(%rbp)
        movw $0x8b, 0x492(%rbp)
        shrq $32, %rbx
        movb %bl, 0x4cb(%rbp)
        movq 48(%r14), %rax
        movq %rax, 0x4d0(%rbp)
        movq 40(%r14), %rax
        movq %rax, 0x548(%rbp)
        movq 32(%r14), %rax
        movq %rax, 0x550(%rbp)
        movq 24(%r14), %rax
        movq %rax, 0x558(%rbp)
        movq 16(%r12), %rax
        movq %rax, 0x570(%rbp)
        movabsq $0x0007040600070406, %rax
        movq %rax, 0x668(%rbp)
        movq (%r12), %rax
        movq %rax, 0x578(%rbp)
        movq $0xf4, 0x5f8(%rbp)
        movq 8(%r12), %rbx
        movq %rbp, %rax
        clgi
        vmrun
        stgi
        movq 0x70(%rbp), %rax
        movq %rax, (%r15)
        movq 0x78(%rbp), %rax
        movq %rax, 8(%r15)
        movq 0x80(%rbp), %rax
        movq %rax, 16(%r15)
        movq 0x5f8(%rbp), %rax
        movq %rax, 24(%r15)
        movq 0x578(%rbp), %rax
        movq %rax, 32(%r15)
        addq $40, %r15
        addq $40, %r12
        decq %r13
        jmp next

done:
        xorl %eax, %eax
        outb %al, $0xf4
        hlt

        .align 8
gdt:
        .quad 0
        .quad 0x00af9b000000ffff
        .quad 0x00cf93000000ffff
gdtr:
        .word gdtr - gdt - 1
        .long gdt
